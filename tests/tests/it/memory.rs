//! Memory of every process while data grows.

use crate::needs_fuse;
use cairn_tests::cluster::Cluster;
use cairn_tests::process;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// What is written in each round: to a file of its own, and over the export.
const FILE_BYTES: usize = 2 << 20;
const EXPORT_BYTES: usize = 1 << 20;
const ROUND: Duration = Duration::from_secs(1);
const ROUNDS_OF_SAMPLE: u64 = 20;
/// What may be added in the last third by allocators, caches and the index, 1 GiB per TiB.
const SLACK_KIB: u64 = 24 << 10;

/// Resident memory of each process in KiB.
fn resident(cluster: &Cluster) -> BTreeMap<String, u64> {
    let of = |pid: u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:"))?.to_owned();
        line.split_whitespace().nth(1)?.parse().ok()
    };
    cluster.processes().into_iter().filter_map(|(label, pid)| Some((label, of(pid)?))).collect()
}

#[test]
#[ignore = "ten minutes; CAIRN_MEMORY_SECONDS for more or less"]
fn memory_stays_flat_while_data_grows() {
    needs_fuse!();
    let seconds = std::env::var("CAIRN_MEMORY_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(600);
    let mut cluster = Cluster::start_sized(Duration::from_secs(seconds * 2 + 300), "6G");
    let mut export = cluster.nbd();
    let dir = cluster.mount().join("grows");
    std::fs::create_dir(&dir).expect("make a directory");
    let bytes: Vec<u8> = (0..FILE_BYTES).map(|at| (at * 7 % 251) as u8).collect();
    let mut samples = Vec::new();
    let begun = process::now();
    for round in 0u64.. {
        let due = ROUND * u32::try_from(round).expect("rounds are few");
        if due >= Duration::from_secs(seconds) {
            break;
        }
        while begun.elapsed() < due {
            process::pause();
        }
        let file = File::create(dir.join(round.to_string())).expect("create a file");
        file.write_all_at(&bytes, 0).expect("write it");
        file.sync_all().expect("sync it");
        for at in 0..EXPORT_BYTES / 4096 {
            let offset = (round * EXPORT_BYTES as u64 + at as u64 * 4096) % (2 << 30);
            export.write_at(&bytes[at * 4096..][..4096], offset).expect("write to the export");
        }
        export.flush().expect("flush the export");
        if round.is_multiple_of(ROUNDS_OF_SAMPLE) {
            samples.push(resident(&cluster));
            let line: Vec<String> =
                samples.last().expect("just pushed").iter().map(|(who, kib)| format!("{who} {}", kib >> 10)).collect();
            eprintln!("{:5.0} s, MiB: {}", begun.elapsed().as_secs_f64(), line.join(", "));
        }
    }
    let third = samples.len() / 3;
    for who in samples[0].keys() {
        let most =
            |part: &[BTreeMap<String, u64>]| part.iter().filter_map(|at| at.get(who)).max().copied().unwrap_or(0);
        let (middle, last) = (most(&samples[third..2 * third]), most(&samples[2 * third..]));
        assert!(last <= middle + SLACK_KIB, "{who} grew from {} to {} MiB", middle >> 10, last >> 10);
    }
    cluster.stop();
}
