//! Chores of the workspace. Filled in by `tidy`, `requirements` and `ci`.
fn main() {}
