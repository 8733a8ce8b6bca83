//! The files of a node below `/etc/cairn`.

use crate::alloc::measured;
use crate::{Bound, Seeds, Shape, Target, samples, seed, unsealed};
use cairn_client::cluster::parse_servers_with;
use cairn_types::{ClusterId, HostId};
use cairn_wire::auth::{ClusterKey, is_cluster_name};
use std::path::Path;

pub const TARGET: Target = Target {
    name: "cluster_files",
    covers: "`bs.list`, the cluster key, host and cluster ids, cluster names",
    entry: "cairn_client::cluster::parse_servers_with, ClusterKey::from_hex, HostId::from_str",
    shape: Shape::Text,
    bound: Bound::STRICT,
    run,
    seal: unsealed,
    seeds,
};

fn run(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    measured(bytes.len(), || {
        // Names are not looked up here: every host has two addresses.
        let mut resolve = |host: &str, port: u16| match host.len() {
            0 => Err(std::io::Error::other("no host")),
            _ => Ok(vec![samples::addr(port), samples::addr(port)]),
        };
        if let Err(error) = parse_servers_with(Path::new("bs.list"), text, &mut resolve) {
            let _ = error.to_string();
        }
        if let Some(key) = ClusterKey::from_hex(text) {
            assert_eq!(key.to_hex(), text.trim().to_ascii_lowercase(), "a key means its digits");
        }
        if let Ok(id) = text.parse::<HostId>() {
            assert_eq!(id.to_string(), text.trim().to_ascii_lowercase(), "an id means its digits");
        }
        let _ = (text.parse::<ClusterId>().is_ok(), is_cluster_name(text));
    });
}

fn seeds() -> Seeds {
    let list = "# metadata servers\n127.0.0.1:2510\n\n[::1]:7 # second\n10.0.0.3\nhost.example:2510\nhost\n";
    vec![
        seed("list", list.into()),
        seed("key", (samples::key().to_hex() + "\n").into_bytes()),
        seed("id", HostId([0xab; 16]).to_string().into_bytes()),
        seed("name", b"stor-1_A".to_vec()),
    ]
}
