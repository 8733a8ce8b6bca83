//! A disk is replaced by one verb.

use cairn_tests::cluster::Cluster;
use cairn_tests::process::poll;
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);
const PIECE: usize = 64 << 10;

/// Directory and state of a chunk server.
fn server(cluster: &Cluster, id: u64) -> (String, String) {
    let stat = cluster.json(&["stat"]).expect("stat");
    let servers = stat["cs"].as_array().expect("servers");
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let one = servers.iter().find(|cs| cs["id"] == id).expect("a server of that id");
    (text(&one["repository"]), text(&one["state"]))
}

/// Label and id of a server that holds data.
fn holders(cluster: &Cluster) -> Vec<(String, u64)> {
    poll("servers tell of the data they hold", LIMIT, || {
        let stat = cluster.json(&["stat"])?;
        let holds = |cs: &&Value| cs["used"].as_u64().is_some_and(|used| used >= 4 << 20);
        let servers = stat["cs"].as_array()?.iter().filter(holds);
        let one = |cs: &Value| Some((cs["repository"].as_str()?.rsplit('/').next()?.to_owned(), cs["id"].as_u64()?));
        let found: Vec<_> = servers.filter_map(one).collect();
        (found.len() >= 2).then_some(found)
    })
}

fn assert_filled(cluster: &Cluster) {
    let mut nbd = cluster.nbd();
    for at in 0..64 {
        let mut read = vec![0; PIECE];
        nbd.read_at(&mut read, at << 20).expect("read");
        assert!(read.iter().all(|byte| *byte == 7), "wrong data at {at} MiB");
    }
}

#[test]
fn a_lost_disk_and_a_working_one_are_replaced_and_keep_their_ids() {
    let mut cluster = Cluster::start_sized(Duration::from_secs(300), "1G");
    let mut nbd = cluster.nbd();
    for at in 0..64 {
        nbd.write_at(&[7; PIECE], at << 20).expect("write");
    }
    nbd.flush().expect("flush");
    drop(nbd);
    let held = holders(&cluster);
    let ((lost, lost_id), (worn, worn_id)) = (&held[0], &held[1]);
    let words = |dir: &Path, id: u64| {
        ["replace-cs", &id.to_string(), "-r", dir.to_str().expect("UTF-8"), "--size", "1G"].map(str::to_owned)
    };
    let run = |cluster: &mut Cluster, label: &str, dir: &Path, id: u64| {
        cluster.run_by_hand(label, &["cs", "run", "-r", dir.to_str().expect("UTF-8")]);
        let here = dir.to_str().expect("UTF-8").to_owned();
        poll("the new disk serves", LIMIT, || (server(cluster, id) == (here.clone(), "active".into())).then_some(()));
        cluster.wait_until_healthy(LIMIT);
        assert_filled(cluster);
    };

    // One is gone for good: while it may still answer, nothing is done behind its back.
    cluster.kill(lost);
    poll("the killed server is silent", LIMIT, || (server(&cluster, *lost_id).1 != "active").then_some(()));
    let first = cluster.beside("first");
    let command = words(&first, *lost_id);
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    cluster.cairn(&command).must_succeed("replace-cs");
    cluster.cairn(&command).must_succeed("replace-cs again, as after a crash of the command");
    let taken = cluster.cairn(&["replace-cs", &worn_id.to_string(), "-r", first.to_str().expect("UTF-8")]);
    assert!(taken.code != 0 && taken.stderr.contains("another chunk server"), "{}", taken.text());
    run(&mut cluster, "first", &first, *lost_id);

    // The other still works: its chunks go elsewhere before.
    let second = cluster.beside("second");
    let command = words(&second, *worn_id);
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    cluster.cairn(&command).must_succeed("replace-cs of a server that answers");
    run(&mut cluster, "second", &second, *worn_id);

    // The old directory has no way back.
    cluster.restart(lost);
    let log = cluster.dir().join("log").join(format!("{lost}.log"));
    poll("the old directory is refused", LIMIT, || {
        std::fs::read_to_string(&log).ok()?.contains("known with another store").then_some(())
    });
    assert_eq!(server(&cluster, *lost_id).0, first.to_str().expect("UTF-8"));
    assert!(cluster.processes().contains_key(worn), "a removed server goes on running until it is stopped");
    assert_filled(&cluster);
    cluster.kill_everything();
}
