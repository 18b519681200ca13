use quota_common::{FieldError, limit::PolicyName};
use serde::{Serialize, Serializer};

use crate::limiter::{Policy, PolicySet};

pub fn wire_name(policy: Policy) -> PolicyName {
    match policy {
        Policy::Rpm => PolicyName::Rpm,
        Policy::Daily => PolicyName::Daily,
        Policy::Monthly => PolicyName::Monthly,
        Policy::TenantMonthly => PolicyName::TenantMonthly,
    }
}

/// A [`Problem`](quota_common::Problem) with borrowed fields, so that denying a request is as cheap as allowing it.
#[derive(Serialize)]
pub(super) struct Body<'a> {
    #[serde(rename = "type")]
    pub(super) kind: &'a str,
    pub(super) title: &'a str,
    pub(super) status: u16,
    pub(super) detail: &'a str,
    pub(super) request_id: &'a str,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub(super) errors: &'a [FieldError],
    #[serde(rename = "violated-policies", skip_serializing_if = "Names::is_empty")]
    pub(super) violated_policies: Names,
}

/// Serializes policies by their names in the API.
pub(super) struct Names(pub(super) PolicySet);

impl Names {
    const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Serialize for Names {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(wire_name))
    }
}

#[cfg(test)]
mod tests {
    use quota_common::Problem;

    use super::*;

    fn json(value: &impl Serialize) -> String {
        serde_json::to_string(value).unwrap()
    }

    #[test]
    fn body_equals_the_wire_type() {
        let errors = [FieldError {
            field: "name".into(),
            message: "is \"odd\"".into(),
        }];
        let mut body = Body {
            kind: "https://q.example/problems/invalid",
            title: "Validation failed",
            status: 422,
            detail: "name: is \"odd\"",
            request_id: "r-1",
            errors: &errors,
            violated_policies: Names(PolicySet::EMPTY),
        };
        let mut expected = Problem {
            kind: body.kind.into(),
            title: body.title.into(),
            status: 422,
            detail: body.detail.into(),
            request_id: "r-1".into(),
            errors: errors.to_vec(),
            violated_policies: vec![],
        };
        assert_eq!(json(&body), json(&expected));

        body.errors = &[];
        let denied = PolicySet::EMPTY.with(Policy::Rpm).with(Policy::Monthly);
        body.violated_policies = Names(denied);
        expected.errors.clear();
        expected.violated_policies = vec![PolicyName::Rpm, PolicyName::Monthly];
        assert_eq!(json(&body), json(&expected));
    }
}
