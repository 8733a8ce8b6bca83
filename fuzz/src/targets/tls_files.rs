//! Certificates and keys of the NBD server.

use crate::alloc::measured;
use crate::{Bound, Seeds, Shape, Target, seed, unsealed};
use cairn_nbd::Tls;
use std::cell::RefCell;

pub const TARGET: Target = Target {
    name: "tls_files",
    covers: "PEM files with certificates, keys and authorities",
    entry: "cairn_nbd::Tls::load",
    shape: Shape::Text,
    bound: Bound { base: 1 << 20, factor: 8, why: "the files are the operator's own; decoding is the library's" },
    run,
    seal: unsealed,
    seeds,
};

thread_local! {
    static DIR: RefCell<Option<tempfile::TempDir>> = const { RefCell::new(None) };
}

/// One file for all three.
fn run(bytes: &[u8]) {
    DIR.with(|dir| {
        let mut dir = dir.borrow_mut();
        let dir = dir.get_or_insert_with(|| tempfile::tempdir().expect("a place for small files")).path();
        let path = dir.join("all.pem");
        std::fs::write(&path, bytes).expect("the place takes small files");
        let loaded = measured(bytes.len(), || Tls::load(&path, &path, Some(&path), true));
        loaded.err().map(|error| error.to_string());
    });
}

fn seeds() -> Seeds {
    vec![seed("pair", include_bytes!("../../samples/pair.pem").to_vec())]
}
