use quota_common::{FieldError, limit::PolicyName};

use crate::{json_text::write_text, limiter::Policy};

pub fn wire_name(policy: Policy) -> PolicyName {
    match policy {
        Policy::Rpm => PolicyName::Rpm,
        Policy::Daily => PolicyName::Daily,
        Policy::Monthly => PolicyName::Monthly,
        Policy::TenantMonthly => PolicyName::TenantMonthly,
    }
}

/// The fields of a [`Problem`](quota_common::Problem) before `detail`.
pub(super) struct Start<'a> {
    pub(super) kind: &'a str,
    pub(super) title: &'a str,
    pub(super) status: u16,
}

impl Start<'_> {
    /// Appends the JSON before the value of `detail`.
    pub(super) fn write(&self, out: &mut Vec<u8>) -> serde_json::Result<()> {
        out.extend_from_slice(b"{\"type\":");
        write_text(self.kind, out)?;
        out.extend_from_slice(b",\"title\":");
        write_text(self.title, out)?;
        out.extend_from_slice(b",\"status\":");
        out.extend_from_slice(itoa::Buffer::new().format(self.status).as_bytes());
        out.extend_from_slice(b",\"detail\":");
        Ok(())
    }
}

/// A [`Problem`](quota_common::Problem) without violated policies, with borrowed fields.
pub(super) struct Body<'a> {
    pub(super) start: Start<'a>,
    pub(super) detail: &'a str,
    pub(super) request_id: &'a str,
    pub(super) errors: &'a [FieldError],
}

impl Body<'_> {
    /// Appends the body as JSON.
    pub(super) fn write(&self, out: &mut Vec<u8>) -> serde_json::Result<()> {
        self.start.write(out)?;
        write_text(self.detail, out)?;
        out.extend_from_slice(b",\"request_id\":");
        write_text(self.request_id, out)?;
        if !self.errors.is_empty() {
            out.extend_from_slice(b",\"errors\":");
            serde_json::to_writer(&mut *out, self.errors)?;
        }
        out.push(b'}');
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use quota_common::Problem;

    use super::*;

    fn json(body: &Body<'_>) -> String {
        let mut json = Vec::new();
        body.write(&mut json).unwrap();
        String::from_utf8(json).unwrap()
    }

    fn expected_json(problem: &Problem) -> String {
        serde_json::to_string(problem).unwrap()
    }

    #[test]
    fn body_equals_the_wire_type() {
        let errors = [FieldError {
            field: "name".into(),
            message: "is \"odd\"".into(),
        }];
        let mut body = Body {
            start: Start {
                kind: "https://q.example/problems/invalid",
                title: "Validation failed",
                status: 422,
            },
            detail: "name: is \"odd\"",
            request_id: "r-1",
            errors: &errors,
        };
        let mut expected = Problem {
            kind: body.start.kind.into(),
            title: body.start.title.into(),
            status: 422,
            detail: body.detail.into(),
            request_id: "r-1".into(),
            errors: errors.to_vec(),
            violated_policies: vec![],
        };
        assert_eq!(json(&body), expected_json(&expected));

        body.errors = &[];
        expected.errors.clear();
        assert_eq!(json(&body), expected_json(&expected));
    }
}
