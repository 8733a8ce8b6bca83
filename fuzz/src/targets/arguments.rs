//! Words of people: the command line, mount options, sizes, redundancy.

use crate::alloc::measured;
use crate::{Bound, Seeds, Shape, Target, seed, unsealed};
use cairn_cli::Cli;
use cairn_fuse::{MountOptions, parse_mount_args};
use cairn_types::{FailureDomain, Redundancy, format_size, parse_size};
use clap::Parser;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

pub const TARGET: Target = Target {
    name: "arguments",
    covers: "every verb's arguments, the words a mount helper gets, lists of mount options, sizes, redundancy schemes, \
             failure domains",
    entry: "cairn_cli::Cli::try_parse_from, cairn_fuse::parse_mount_args, cairn_types::parse_size",
    shape: Shape::Text,
    bound: Bound {
        base: 2 << 20,
        factor: 64,
        why: "clap builds the description of all verbs before it reads the first word; the words are the caller's own",
    },
    run,
    seal: unsealed,
    seeds,
};

/// Byte 0: who reads; then words, one a line.
fn run(bytes: &[u8]) {
    let Some((which, text)) = bytes.split_first() else { return };
    measured(bytes.len(), || match which % 3 {
        0 => {
            let words = text.split(|byte| *byte == b'\n').map(|word| OsString::from_vec(word.to_vec()));
            let words = std::iter::once("cairn".into()).chain(words);
            if let Err(error) = Cli::try_parse_from(cairn_cli::verbs::mount::with_mount_options(words)) {
                let _ = error.to_string();
            }
        }
        1 => {
            let text = String::from_utf8_lossy(text);
            let words: Vec<String> = text.split('\n').map(str::to_owned).collect();
            if let Err(error) = parse_mount_args(&words) {
                let _ = error.to_string();
            }
            let _ = MountOptions::new("stor1", "/mnt").apply(&text);
        }
        _ => {
            let text = String::from_utf8_lossy(text);
            if let Ok(size) = parse_size(&text) {
                let _ = format_size(size).to_string();
            }
            if let Ok(redundancy) = text.parse::<Redundancy>() {
                let again: Result<Redundancy, _> = redundancy.to_string().parse();
                assert_eq!(again.ok(), Some(redundancy), "a scheme survives being printed");
            }
            let _ = text.parse::<FailureDomain>().is_ok();
        }
    });
}

fn seeds() -> Seeds {
    let with = |which: u8, text: &str| [&[which], text.as_bytes()].concat();
    let lines = [
        "-c\nstor1\nmake-mds\n-I\n-r\n/m\n-a\n127.0.0.1:7001\n-p",
        "-c\nstor1\nmake-cs\n-r\n/c\n--size\n10G",
        "-c\nstor1\nmount\n/mnt\n-o\nro,threads=3",
        "-c\nstor1\nvolume\ncreate\nvm1\n--size\n1.5T",
        "-c\nstor1\nset-attr\n-R\n/mnt/a\nreplicas=3:2\nfailure-domain=rack",
        "-c\nstor1\nset-config\nmds.wd.offline_tout=300",
        "--mds-addr\n127.0.0.1:1,[::1]:2\n-o\njson\nstat",
        "-c\nstor1\nnbd\nserve\n--listen\n127.0.0.1:10809",
        "doctor\ncs\n/c\n--deep",
        "bench\nvm1\n--seconds\n5",
        "sim\n--seed\n7\n--trace",
        "-c\nstor1\nrm-cs\n1025\n--wait",
    ];
    let mut seeds: Seeds =
        lines.iter().enumerate().map(|(at, line)| seed(&format!("verb_{at}"), with(0, line))).collect();
    let mount = "cairn://stor1\n/mnt/stor1\n-o\nrw,nosuid,nodev,log=/l,threads=3,lease-wait=9,x-systemd.automount\n-t\nfuse.cairn";
    seeds.push(seed("mount", with(1, mount)));
    seeds.push(seed("options", with(1, "ro,fail-on-nospace,fsname=a,writeback,nodev,sync")));
    for (name, text) in [("size", "1.5GiB"), ("bytes", "4096"), ("scheme", "3:2"), ("domain", "rack")] {
        seeds.push(seed(name, with(2, text)));
    }
    seeds
}
