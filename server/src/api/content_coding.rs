//! Chooses the content coding of a response (RFC 9110, section 12.5.3).

use poem::http::{HeaderMap, HeaderValue, header};

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Coding {
    Brotli,
    Gzip,
    Identity,
}

impl Coding {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Brotli => "br",
            Self::Gzip => "gzip",
            Self::Identity => "identity",
        }
    }
}

/// Writes the headers of a response with this coding. `Vary` is always written, because the coding depends on the
/// request.
pub(super) fn write_coding(coding: Coding, headers: &mut HeaderMap) {
    headers.insert(header::VARY, HeaderValue::from_static("accept-encoding"));
    if coding != Coding::Identity {
        let name = HeaderValue::from_static(coding.name());
        headers.insert(header::CONTENT_ENCODING, name);
    }
}

/// Returns the coding that the client prefers. If the client prefers several codings equally, returns the last of them
/// in `available`, which must be ordered by compressed size, largest first. Returns [`Coding::Identity`] if the client
/// accepts no coding in `available`, or prefers the uncompressed file.
pub(super) fn choose_coding(headers: &HeaderMap, available: &[Coding]) -> Coding {
    let accepted: Vec<(&str, f32)> = headers
        .get_all(header::ACCEPT_ENCODING)
        .iter()
        .filter_map(|field| field.to_str().ok())
        .flat_map(|field| field.split(','))
        .map(|element| {
            let (name, parameter) = element.split_once(';').unwrap_or((element, "q=1"));
            let quality = parameter
                .split_once('=')
                .filter(|(name, _)| name.trim().eq_ignore_ascii_case("q"))
                .and_then(|(_, value)| value.trim().parse().ok());
            // A coding with a malformed quality value is not acceptable.
            (name.trim(), quality.unwrap_or(0.0))
        })
        .collect();
    let quality = |wanted: &str| {
        let found = accepted
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(wanted));
        found.map(|(_, quality)| *quality)
    };
    let mut best = (Coding::Identity, quality("identity").unwrap_or(0.0));
    for coding in available.iter().copied() {
        let quality = quality(coding.name())
            .or_else(|| quality("*"))
            .unwrap_or(0.0);
        if quality > 0.0 && quality >= best.1 {
            best = (coding, quality);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: &[Coding] = &[Coding::Gzip, Coding::Brotli];

    #[test]
    fn the_coding_is_the_one_that_the_client_prefers() {
        let choose = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT_ENCODING, text.parse().unwrap());
            choose_coding(&headers, ALL)
        };
        assert_eq!(choose("gzip, deflate, br, zstd"), Coding::Brotli);
        assert_eq!(choose("gzip, deflate"), Coding::Gzip);
        assert_eq!(choose("GZIP"), Coding::Gzip);
        assert_eq!(choose("*"), Coding::Brotli);
        assert_eq!(choose("br;q=0, *"), Coding::Gzip);
        assert_eq!(choose("br;q=0.5, gzip;q=0.9"), Coding::Gzip);
        assert_eq!(choose("br ; q=0.9 , gzip;Q=0.9"), Coding::Brotli);
        assert_eq!(choose("identity, gzip;q=0.5"), Coding::Identity);
        assert_eq!(choose("gzip;q=0"), Coding::Identity);
        assert_eq!(choose("gzip;q=0.000, *;q=0"), Coding::Identity);
        assert_eq!(choose("gzip;q=abc"), Coding::Identity);
        assert_eq!(choose("gzipped, brotli"), Coding::Identity);
        assert_eq!(choose_coding(&HeaderMap::new(), ALL), Coding::Identity);
        // The header can appear several times.
        let mut headers = HeaderMap::new();
        for coding in ["gzip", "br"] {
            headers.append(header::ACCEPT_ENCODING, coding.parse().unwrap());
        }
        assert_eq!(choose_coding(&headers, ALL), Coding::Brotli);
    }
}
