use serde_json::{Map, Value};

/// An operation in the OpenAPI document.
pub(super) struct Operation<'a> {
    pub(super) path: &'a str,
    pub(super) value: &'a mut Value,
}

impl Operation<'_> {
    pub(super) fn id(&self) -> &str {
        self.value["operationId"].as_str().unwrap_or_default()
    }

    pub(super) fn has_parameter(&self, places: &[&str]) -> bool {
        let parameters = self.value["parameters"].as_array();
        parameters.is_some_and(|all| {
            all.iter()
                .any(|it| places.iter().any(|place| it["in"] == *place))
        })
    }

    pub(super) fn responses(&mut self) -> Option<&mut Map<String, Value>> {
        self.value["responses"].as_object_mut()
    }
}

/// Calls `edit` with every operation in the OpenAPI document.
pub(super) fn for_each_operation(document: &mut Value, mut edit: impl FnMut(Operation<'_>)) {
    let paths = document["paths"].as_object_mut().into_iter().flatten();
    for (path, operations) in paths {
        for (_, value) in operations.as_object_mut().into_iter().flatten() {
            edit(Operation { path, value });
        }
    }
}
