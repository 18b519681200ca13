//! The rights of an organization's members, by role.

use quota_common::auth::Role;

/// A right that a page or command requires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    /// Every member has this right.
    Any,
    /// The right to view plans, keys, tokens, webhooks and the audit log.
    Read,
    /// The right to create, change and delete plans, keys, tokens and webhooks.
    Manage,
    /// The right to view and change the subscription.
    Bill,
}

impl Right {
    pub const fn is_of(self, role: Role) -> bool {
        match self {
            Self::Any => true,
            Self::Read => role.may_read(),
            Self::Manage => role.may_manage(),
            Self::Bill => role.may_bill(),
        }
    }
}

/// Explains why a role cannot use a page.
pub fn no_access(role: Role, what: &str) -> String {
    format!(
        "Your role ({}) doesn't have access to {what}. To get access, ask an owner or an admin of your organization.",
        role.as_str()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_follow_from_the_role() {
        let roles = |right: Right| {
            let all = Role::ALL.iter().filter(|role| right.is_of(**role));
            all.map(|role| role.as_str()).collect::<Vec<_>>()
        };
        let all = ["owner", "admin", "developer", "billing", "viewer"];
        assert_eq!(roles(Right::Any), all);
        assert_eq!(
            roles(Right::Read),
            ["owner", "admin", "developer", "viewer"]
        );
        assert_eq!(roles(Right::Manage), ["owner", "admin", "developer"]);
        assert_eq!(roles(Right::Bill), ["owner", "admin", "billing"]);
    }

    #[test]
    fn reason_names_the_role_and_the_page() {
        assert_eq!(
            no_access(Role::Billing, "the audit log"),
            "Your role (billing) doesn't have access to the audit log. To get access, ask an owner or an admin of your organization."
        );
    }
}
