//! The paths in the OpenAPI document and their methods, for the `Allow` header of 405 responses and for traces. RFC 9110
//! (15.5.6) requires the header, but poem does not add it.

use serde_json::Value;

/// The methods that each path supports, according to the OpenAPI document.
#[derive(Debug, Default)]
pub struct Methods(Vec<Path>);

#[derive(Debug)]
struct Path {
    /// The path as in the document, such as `/admin/plans/{plan_id}`.
    template: String,
    /// The value of `Allow`.
    methods: String,
}

impl Path {
    fn fits(&self, path: &str) -> bool {
        let (mut names, mut parts) = (self.template.split('/'), path.split('/'));
        loop {
            match (names.next(), parts.next()) {
                (None, None) => return true,
                (Some(name), Some(part)) if name.starts_with('{') || name == part => {}
                _ => return false,
            }
        }
    }
}

impl Methods {
    pub fn of(document: &Value) -> Self {
        let paths = document["paths"].as_object().into_iter().flatten();
        let methods = paths.map(|(path, operations)| {
            let mut methods = operations
                .as_object()
                .into_iter()
                .flat_map(serde_json::Map::keys)
                .map(|method| method.to_uppercase())
                .collect::<Vec<_>>();
            if methods.iter().any(|it| it == "GET") && !methods.iter().any(|it| it == "HEAD") {
                methods.push("HEAD".into());
            }
            methods.sort();
            Path {
                template: path.clone(),
                methods: methods.join(", "),
            }
        });
        Self(methods.collect())
    }

    /// Returns the `Allow` header for a path. Paths that are not in the document are web pages, which are read-only.
    pub fn allow(&self, path: &str) -> &str {
        self.find(path).map_or("GET, HEAD", |it| &it.methods)
    }

    /// Returns the template of a path, such as `/admin/plans/{plan_id}`, if the path is in the document.
    pub fn template(&self, path: &str) -> Option<&str> {
        self.find(path).map(|it| it.template.as_str())
    }

    fn find(&self, path: &str) -> Option<&Path> {
        self.0.iter().find(|it| it.fits(path))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::Methods;

    #[test]
    fn path_allows_the_methods_of_its_operations() {
        let methods = Methods::of(&json!({"paths": {
            "/plans": {"post": {}, "get": {}},
            "/plans/{id}": {"delete": {}},
        }}));
        assert_eq!(methods.allow("/plans"), "GET, HEAD, POST");
        assert_eq!(methods.allow("/plans/7"), "DELETE");
        assert_eq!(methods.allow("/docs"), "GET, HEAD");
    }

    #[test]
    fn path_has_the_template_of_its_operations() {
        let methods = Methods::of(&json!({"paths": {"/plans": {}, "/plans/{id}/keys": {}}}));
        assert_eq!(methods.template("/plans"), Some("/plans"));
        assert_eq!(methods.template("/plans/7/keys"), Some("/plans/{id}/keys"));
        for path in ["/plans/", "/plans/7", "/plans/7/keys/8", "/", ""] {
            assert_eq!(methods.template(path), None, "{path}");
        }
    }
}
