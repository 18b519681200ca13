//! The commands that the console may call. `build.rs` declares them, and `capabilities/main.json` allows them.

pub mod notification;
pub mod profile;
pub mod server;
pub mod system;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    /// Returns the permissions for the commands that `build.rs` declares.
    fn declared_permissions() -> BTreeSet<String> {
        let script = include_str!("../../build.rs");
        let (_, list) = script.split_once(".commands(&[").expect("the list");
        let (list, _) = list.split_once(']').expect("its end");
        list.split('"')
            .skip(1)
            .step_by(2)
            .map(|name| format!("allow-{}", name.replace('_', "-")))
            .collect()
    }

    #[test]
    fn page_may_call_only_declared_commands() {
        let capability: Value =
            serde_json::from_str(include_str!("../../capabilities/main.json")).expect("JSON");
        let granted: BTreeSet<String> = capability["permissions"]
            .as_array()
            .expect("permissions")
            .iter()
            .map(|it| it.as_str().expect("a name").to_owned())
            .collect();
        assert_eq!(granted, declared_permissions());
        assert_eq!(capability["windows"], serde_json::json!(["main"]));
        assert!(capability.get("remote").is_none());
    }

    #[test]
    fn page_has_a_strict_content_security_policy() {
        let config: Value =
            serde_json::from_str(include_str!("../../tauri.conf.json")).expect("JSON");
        let security = &config["app"]["security"];
        let policy = security["csp"].as_str().expect("a policy");
        assert!(policy.starts_with("default-src 'none'"), "{policy}");
        assert!(
            !policy.contains("unsafe-inline") && !policy.contains("'unsafe-eval'"),
            "{policy}"
        );
        assert_eq!(security["freezePrototype"], true);
        assert_eq!(config["app"]["withGlobalTauri"], false);
        assert_eq!(security["capabilities"], serde_json::json!(["main"]));
    }
}
