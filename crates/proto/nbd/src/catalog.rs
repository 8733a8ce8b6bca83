//! What a session needs to know of the exports behind it.

/// An export as the handshake describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// The server's own name of it, at most [`crate::limits::STRING_MAX`] bytes.
    pub name: String,
    /// A text for people; empty for none.
    pub description: String,
    /// Size in bytes at this moment.
    pub size: u64,
    /// True when writes are refused.
    pub read_only: bool,
}

/// The exports of a server at this moment.
pub trait Catalog {
    /// The export called exactly `name`.
    fn get(&self, name: &str) -> Option<ExportInfo>;

    /// The name and description of every export, in the order a client shall see them.
    fn list(&self) -> Vec<(String, String)>;
}

/// The export a client means: the one of that name, or for the empty name the only one there is.
pub fn resolve(catalog: &dyn Catalog, name: &str) -> Option<ExportInfo> {
    if let Some(found) = catalog.get(name) {
        return Some(found);
    }
    if !name.is_empty() {
        return None;
    }
    match catalog.list().as_slice() {
        [(only, _)] => catalog.get(only),
        _ => None,
    }
}
