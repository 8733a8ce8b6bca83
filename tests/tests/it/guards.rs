//! Removals that would lose data or the majority are refused, with what would be lost.

use crate::needs_fuse;
use cairn_tests::cluster::Cluster;
use cairn_tests::process::poll;
use serde_json::Value;
use std::fs;
use std::io::Write;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);

/// Label and id of each chunk server.
fn servers(cluster: &Cluster) -> Vec<(String, u64, String)> {
    let stat = cluster.json(&["stat"]).expect("stat");
    let one = |cs: &Value| {
        let label = cs["repository"].as_str()?.rsplit('/').next()?.to_owned();
        Some((label, cs["id"].as_u64()?, cs["state"].as_str()?.to_owned()))
    };
    stat["cs"].as_array().expect("servers").iter().map(|cs| one(cs).expect("a server")).collect()
}

fn mds_state(cluster: &Cluster, id: u64) -> Option<String> {
    let stat = cluster.json(&["stat"])?;
    let one = stat["mds"].as_array()?.iter().find(|mds| mds["id"] == id)?.clone();
    Some(one["state"].as_str()?.to_owned())
}

#[test]
fn a_removal_that_loses_data_or_the_majority_is_refused_with_what_would_be_lost() {
    needs_fuse!();
    let mut cluster = Cluster::start_sized(Duration::from_secs(300), "1G");
    let dir = cluster.mount().join("one");
    fs::create_dir(&dir).expect("make a directory");
    cluster.cairn(&["set-attr", dir.to_str().expect("UTF-8"), "replicas=1"]).must_succeed("set-attr");
    for number in 0..12 {
        let mut file = fs::File::create(dir.join(format!("only{number}"))).expect("create");
        file.write_all(&[7; 8192]).expect("write");
        file.sync_all().expect("sync");
    }
    let (label, id, lost) = servers(&cluster)
        .into_iter()
        .find_map(|(label, id, _)| {
            let plan = cluster.json(&["rm-cs", &id.to_string(), "-f", "--dry-run"])?;
            assert!(plan["refused"].as_str()?.contains("answers"), "{plan}");
            let names: Vec<String> =
                plan["lost"].as_array()?.iter().filter_map(|lost| lost["name"].as_str()).map(str::to_owned).collect();
            (!names.is_empty()).then_some((label, id, names))
        })
        .expect("some server holds an only copy");
    assert!(lost.iter().all(|name| name.starts_with("/one/only")), "{lost:?}");
    let id = id.to_string();
    let refused = cluster.cairn(&["rm-cs", &id, "-f"]);
    assert!(refused.code != 0 && refused.stderr.contains("answers"), "{}", refused.text());
    let refused = cluster.cairn(&["rm-cs", &id, "-f", "--lose-data"]);
    assert!(refused.code != 0 && refused.stderr.contains("answers"), "{}", refused.text());
    cluster.kill(&label);
    let silent =
        |cluster: &Cluster| servers(cluster).iter().any(|(other, _, state)| *other == label && state != "active");
    poll("the killed server is silent", LIMIT, || silent(&cluster).then_some(()));
    let refused = cluster.cairn(&["rm-cs", &id, "-f"]);
    assert!(refused.code != 0 && refused.stderr.contains("--lose-data"), "{}", refused.text());
    assert!(lost.iter().all(|name| refused.stderr.contains(name.as_str())), "{}", refused.text());
    assert_eq!(cluster.cairn(&["rm-cs", &id, "--lose-data"]).code, 2, "only with -f");
    cluster.cairn(&["rm-cs", &id, "-f", "--lose-data"]).must_succeed("rm-cs -f --lose-data");
    let events = cluster.cairn(&["get-event"]).stdout;
    assert!(events.contains("MDS-4011"), "{events}");
    // What was given up can be deleted.
    fs::remove_file(cluster.mount().join(&lost[0][1..])).expect("delete a lost file");

    // Of three metadata servers one dies: no other may leave, the dead one may.
    let leader = cluster.leader();
    let followers: Vec<u64> = (1..=3).filter(|n| leader != format!("mds{n}")).collect();
    cluster.kill(&format!("mds{}", followers[0]));
    poll("the killed one is silent", LIMIT, || (mds_state(&cluster, followers[0])? == "silent").then_some(()));
    let refused = cluster.cairn(&["rm-mds", &followers[1].to_string()]);
    assert!(refused.code != 0 && refused.stderr.contains("a majority is 2"), "{}", refused.text());
    cluster.cairn(&["rm-mds", &followers[0].to_string()]).must_succeed("rm-mds of the dead one");
    cluster.kill_everything();
}
