//! Parses the settings for OpenTelemetry traces. Their names and formats are those of the OpenTelemetry specification.

use http::{HeaderName, HeaderValue};
use percent_encoding::percent_decode_str;
use secrecy::{ExposeSecret as _, SecretString};

use super::{
    Settings, TraceSettings,
    reader::{Reader, public_url},
};

/// Reads the settings for traces. All of them are parsed even if OTEL_EXPORTER_OTLP_ENDPOINT is not set, so that
/// invalid values are always reported.
pub(super) fn read(r: &mut Reader, s: &Settings) -> Option<TraceSettings> {
    let endpoint = r.read(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        &s.otel_exporter_otlp_endpoint,
        None,
        |text| match text {
            "" => Ok(None),
            text => public_url(text).map(Some),
        },
    );
    let given = r.or_file(
        "OTEL_EXPORTER_OTLP_HEADERS",
        &s.otel_exporter_otlp_headers,
        &s.otel_exporter_otlp_headers_file,
    );
    let text = given.value.as_ref().map_or("", |it| it.expose_secret());
    let headers = headers(text).unwrap_or_else(|message| {
        // The value is not shown, because it may contain a credential.
        let variable = &given.variable;
        r.0.push(format!("{variable}: {message}"));
        Vec::new()
    });
    let service_name = r.read(
        "OTEL_SERVICE_NAME",
        &s.otel_service_name,
        String::new(),
        |text| match text {
            "" => Ok("quota".to_owned()),
            text if text.chars().count() <= 100 && !text.chars().any(char::is_control) => {
                Ok(text.to_owned())
            }
            _ => Err("must be at most 100 characters, without control characters".into()),
        },
    );
    let ratio = r.read(
        "OTEL_TRACES_SAMPLER_ARG",
        &s.otel_traces_sampler_arg,
        0.0,
        |text| {
            let ratio = text.parse().ok().filter(|it| (0.0..=1.0).contains(it));
            ratio.ok_or("must be a number from 0 to 1".into())
        },
    );
    Some(TraceSettings {
        endpoint: endpoint?,
        headers,
        service_name,
        ratio,
    })
}

/// Parses `name=value,name=value`, with percent-encoded values.
fn headers(text: &str) -> Result<Vec<(String, SecretString)>, &'static str> {
    let items = text.split(',').map(str::trim).filter(|it| !it.is_empty());
    let header = |item: &str| {
        let (name, value) = item.split_once('=')?;
        let name = HeaderName::from_bytes(name.trim().as_bytes()).ok()?;
        let value = percent_decode_str(value.trim()).decode_utf8().ok()?;
        HeaderValue::from_str(&value).ok()?;
        Some((name.to_string(), SecretString::from(value.into_owned())))
    };
    items
        .map(|item| header(item).ok_or("must be headers such as api-key=secret"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Option<Vec<(String, String)>> {
        let headers = headers(text).ok()?.into_iter();
        Some(
            headers
                .map(|(name, value)| (name, value.expose_secret().to_owned()))
                .collect(),
        )
    }

    #[test]
    fn headers_are_separated_by_commas_and_percent_encoded() {
        let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(parsed(""), Some(vec![]));
        assert_eq!(
            parsed(" api-key=a%2Cb%3D , Authorization=Basic%20dTpw= ,"),
            Some(vec![
                header("api-key", "a,b="),
                header("authorization", "Basic dTpw=")
            ])
        );
        for invalid in ["secret", "a b=c", "=c", "a=%0a", "a=%ff"] {
            assert_eq!(parsed(invalid), None, "{invalid}");
        }
    }
}
