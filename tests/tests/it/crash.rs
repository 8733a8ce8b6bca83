//! `kill -9` of one server, of the leader, and of everything at once, under loads that know their data.

use crate::needs_fuse;
use cairn_tests::cluster::Cluster;
use cairn_tests::stamped::{Model, StopGuard, wait_for_steps};
use cairn_tests::tree;
use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Blocks of each load: 192 MiB, so that several chunks take part.
const BLOCK_COUNT: u64 = 49_152;
/// A load does its next steps within this time, whatever died.
const PROGRESS_LIMIT: Duration = Duration::from_secs(60);
const HEAL_LIMIT: Duration = Duration::from_secs(120);

fn open_file(cluster: &Cluster) -> File {
    let path = cluster.mount().join("stamped");
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path).expect("open the file");
    file.set_len(BLOCK_COUNT * 4096).expect("set its length");
    file
}

/// Creates, renames, links and removes; what was answered must be there at the end. No error is allowed.
fn metadata_load(root: &Path, stop: &AtomicBool, done: &AtomicU64) -> Vec<String> {
    std::fs::create_dir_all(root).expect("make a directory");
    let mut kept = Vec::new();
    for number in 0u64.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let name = |prefix: &str| root.join(format!("{prefix}{number}"));
        std::fs::create_dir(name("d")).expect("make a directory");
        std::fs::write(name("d").join("new"), number.to_string()).expect("write a file");
        std::fs::rename(name("d").join("new"), name("f")).expect("rename it");
        if number.is_multiple_of(3) {
            std::fs::remove_file(name("f")).expect("remove it");
        } else {
            kept.push(format!("f{number}"));
        }
        std::fs::remove_dir(name("d")).expect("remove the directory");
        done.fetch_add(1, Ordering::SeqCst);
    }
    kept
}

/// Runs the loads on NBD, on a file, and on names; meanwhile `disturb`, which gets a function that waits for progress.
fn under_load(cluster: &mut Cluster, disturb: impl FnOnce(&mut Cluster, &dyn Fn())) {
    let mut nbd = cluster.nbd();
    let mut file = open_file(cluster);
    let names = cluster.mount().join("names");
    let (mut nbd_model, mut file_model) = (Model::new(1), Model::new(2));
    let stop = AtomicBool::new(false);
    let done = [AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0)];
    let mut kept = Vec::new();
    std::thread::scope(|scope| {
        let guard = StopGuard(&stop);
        let on_nbd = scope.spawn(|| nbd_model.run_until(&mut nbd, BLOCK_COUNT, &stop, &done[0]));
        let on_file = scope.spawn(|| file_model.run_until(&mut file, BLOCK_COUNT, &stop, &done[1]));
        let on_names = scope.spawn(|| metadata_load(&names, &stop, &done[2]));
        let progress = || {
            for (done, more) in done.iter().zip([100, 100, 10]) {
                wait_for_steps(done, more, PROGRESS_LIMIT);
            }
        };
        progress();
        disturb(cluster, &progress);
        progress();
        drop(guard);
        on_nbd.join().expect("the load on NBD saw no error");
        on_file.join().expect("the load on the file saw no error");
        kept = on_names.join().expect("the load on names saw no error");
    });
    drop(file);
    let steps = done.map(AtomicU64::into_inner);
    eprintln!(
        "steps: NBD {}, file {}, names {}; longest stalls {:.1} s and {:.1} s",
        steps[0],
        steps[1],
        steps[2],
        nbd_model.stall_max.as_secs_f64(),
        file_model.stall_max.as_secs_f64()
    );
    verify(cluster, &nbd_model, &file_model, &kept);
}

fn verify(cluster: &Cluster, nbd_model: &Model, file_model: &Model, kept: &[String]) {
    let blocks = nbd_model.check_all(&mut cluster.nbd(), false);
    let file_blocks = file_model.check_all(&mut open_file(cluster), false);
    for name in kept {
        let text = std::fs::read_to_string(cluster.mount().join("names").join(name));
        assert_eq!(text.expect("an answered rename is kept"), name[1..], "{name}");
    }
    let found = std::fs::read_dir(cluster.mount().join("names")).expect("list the names").count();
    assert_eq!(found, kept.len(), "removed names stay removed");
    eprintln!("verified {blocks} blocks on NBD, {file_blocks} in the file, {found} names");
}

#[test]
fn a_killed_chunk_server_costs_no_error_and_the_cluster_heals_when_it_is_back() {
    needs_fuse!();
    let mut cluster = Cluster::start(Duration::from_secs(400));
    under_load(&mut cluster, |cluster, progress| {
        cluster.kill("cs1");
        progress();
        cluster.restart("cs1");
        progress();
    });
    cluster.wait_until_healthy(HEAL_LIMIT);
    // What it missed was brought to it: with two of the other three gone, every chunk they share with it is read from
    // it.
    let mut model = Model::new(3);
    model.run_steps(&mut cluster.nbd(), 1024, 100);
    model.flush(&mut cluster.nbd()).expect("flush");
    cluster.kill("cs2");
    cluster.kill("cs3");
    model.check_all(&mut cluster.nbd(), false);
    cluster.restart("cs2");
    cluster.restart("cs3");
    cluster.wait_until_healthy(HEAL_LIMIT);
    cluster.stop();
}

#[test]
fn a_killed_leader_stops_neither_data_nor_names_for_long() {
    needs_fuse!();
    let mut cluster = Cluster::start(Duration::from_secs(400));
    under_load(&mut cluster, |cluster, progress| {
        for _ in 0..2 {
            let leader = cluster.leader();
            eprintln!("kill -9 of {leader}");
            cluster.kill(&leader);
            progress();
            assert_ne!(cluster.leader(), leader, "another one leads");
            cluster.restart(&leader);
            cluster.wait_until_healthy(HEAL_LIMIT);
            progress();
        }
    });
    cluster.stop();
}

#[test]
fn what_was_flushed_survives_a_crash_of_every_process_at_once() {
    needs_fuse!();
    let mut cluster = Cluster::start(Duration::from_secs(400));
    let source = cluster.beside("source");
    tree::make(&source, 500, 5).expect("make the source tree");
    let (mut nbd_model, mut file_model) = (Model::new(6), Model::new(7));
    for round in 0..2 {
        let mount = cluster.mount().display().to_string();
        let copy = format!("{mount}/copy{round}");
        cluster.tool("cp", &["-a", &source.display().to_string(), &copy], PROGRESS_LIMIT);
        cluster.tool("sync", &["-f", &mount], PROGRESS_LIMIT);
        for entry in tree::digest(&source).expect("read the source").keys() {
            let path = Path::new(&copy).join(entry);
            if path.is_file() {
                File::open(path).and_then(|file| file.sync_all()).expect("fsync");
            }
        }
        let (mut nbd, mut file) = (cluster.nbd(), open_file(&cluster));
        nbd_model.run_steps(&mut nbd, BLOCK_COUNT, 400);
        file_model.run_steps(&mut file, BLOCK_COUNT, 400);
        nbd_model.flush(&mut nbd).expect("flush");
        file_model.flush(&mut file).expect("fsync");
        // These may be lost or kept, block by block, but never torn or mixed up.
        nbd_model.run_steps(&mut nbd, BLOCK_COUNT, 40);
        file_model.run_steps(&mut file, BLOCK_COUNT, 40);
        drop(file);
        cluster.kill_everything();
        cluster.start_again();
        for earlier in 0..=round {
            tree::compare(&source, &cluster.mount().join(format!("copy{earlier}")));
        }
        let blocks = nbd_model.check_all(&mut cluster.nbd(), true);
        let file_blocks = file_model.check_all(&mut open_file(&cluster), true);
        eprintln!("round {round}: {blocks} blocks on NBD and {file_blocks} in the file are as flushed");
        nbd_model.settle(&mut cluster.nbd());
        file_model.settle(&mut open_file(&cluster));
    }
    cluster.wait_until_healthy(HEAL_LIMIT);
    cluster.stop();
}
