//! The identity files of servers.

use crate::alloc::measured;
use crate::{Bound, Seeds, Shape, Target, samples, seed, unsealed};
use cairn_types::HostId;
use std::cell::RefCell;

pub const TARGET: Target = Target {
    name: "repository",
    covers: "`cs.conf` and `options.json` of a chunk server, `mds.json` of a metadata server: read as daemons, \
             listings and the doctor read them",
    entry: "cairn_cs::read_identity, cairn_cli::verbs::cs::CsOptions::read, cairn_mds::repository::Repository::open",
    shape: Shape::Text,
    bound: Bound::STRICT,
    run,
    seal: unsealed,
    seeds,
};

thread_local! {
    static DIR: RefCell<Option<tempfile::TempDir>> = const { RefCell::new(None) };
}

/// Byte 0: which file; then its content.
fn run(bytes: &[u8]) {
    let Some((which, content)) = bytes.split_first() else { return };
    DIR.with(|dir| {
        let mut dir = dir.borrow_mut();
        let dir = dir.get_or_insert_with(|| tempfile::tempdir().expect("a place for small files")).path();
        let write = |name: &str| std::fs::write(dir.join(name), content).expect("the place takes small files");
        match which % 3 {
            0 => {
                write("cs.conf");
                let read = measured(content.len(), || cairn_cs::read_identity(dir));
                read.err().map(|error| error.to_string());
            }
            1 => {
                write("options.json");
                let read = measured(content.len(), || cairn_cli::verbs::cs::CsOptions::read(dir));
                read.err().map(|error| format!("{error:#}"));
            }
            _ => {
                write("mds.json");
                let read = measured(content.len(), || cairn_mds::repository::Repository::open(dir));
                read.err().map(|error| error.to_string());
            }
        }
    });
}

fn seeds() -> Seeds {
    let id = samples::CLUSTER;
    let host = HostId([9; 16]);
    let conf = format!(
        "# Identity\nformat = 1\ncluster = {id}\ncluster_name = stor1\nstore = {host}\nhost = {host}\ntier = 1\ncs = 1025\n"
    );
    let options = r#"{"listen": "127.0.0.1:0", "durable_always": false, "place": {"rack": "r1"}}"#;
    let mds = format!(
        r#"{{"version": 1, "cluster": "{id}", "cluster_name": "stor1", "id": 1, "instance": 77, "bootstrap": true,
"addr": "127.0.0.1:7001", "servers": [[1, "127.0.0.1:7001"], [2, "[::1]:7"]]}}"#
    );
    let with = |which: u8, text: &str| [&[which], text.as_bytes()].concat();
    vec![seed("cs_conf", with(0, &conf)), seed("options", with(1, options)), seed("mds", with(2, &mds))]
}
