//! The `Allow` header of 405 responses. RFC 9110 (15.5.6) requires it, but poem does not add it.

use serde_json::Value;

/// The methods that each path supports, according to the OpenAPI document.
#[derive(Debug, Default)]
pub struct Methods(Vec<(Vec<String>, String)>);

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
            (
                path.split('/').map(str::to_owned).collect(),
                methods.join(", "),
            )
        });
        Self(methods.collect())
    }

    /// Returns the `Allow` header for a path. Paths that are not in the document are web pages, which are read-only.
    pub fn allow(&self, path: &str) -> &str {
        let parts = path.split('/').collect::<Vec<_>>();
        let fits = |names: &[String]| {
            names.len() == parts.len()
                && names
                    .iter()
                    .zip(&parts)
                    .all(|(name, part)| name.starts_with('{') || name == part)
        };
        self.0
            .iter()
            .find(|(names, _)| fits(names))
            .map_or("GET, HEAD", |(_, methods)| methods)
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
}
