//! PostgreSQL with its data directory on the mount: crashes of the database and of the mount under it.

use crate::needs_fuse;
use cairn_tests::cluster::Cluster;
use cairn_tests::process::{self, Outcome, is_root};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
/// A database that starts on a mount whose predecessor was killed waits for that one's leases to end.
const RECOVERY_LIMIT: Duration = Duration::from_secs(120);

/// The newest installation, if any.
fn find() -> Option<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = std::fs::read_dir("/usr/lib/postgresql")
        .ok()?
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin"))))
        .filter(|(_, bin)| bin.join("initdb").is_file() && bin.join("pgbench").is_file())
        .collect();
    found.sort();
    Some(found.pop()?.1)
}

/// User and group `postgres`, else `nobody`: the database refuses to run as root.
fn account() -> Option<(u32, u32)> {
    let users = std::fs::read_to_string("/etc/passwd").ok()?;
    ["postgres", "nobody"].into_iter().find_map(|name| {
        let line = users.lines().find(|line| line.starts_with(&format!("{name}:")))?;
        let mut fields = line.split(':').skip(2);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    })
}

struct Database {
    bin: PathBuf,
    account: (u32, u32),
    data: PathBuf,
    socket: PathBuf,
}

impl Database {
    fn command(&self, cluster: &Cluster, program: &str, words: &[&str]) -> Command {
        let mut command = cluster.command(self.bin.join(program));
        command.args(words).current_dir(&self.socket).env("PGHOST", &self.socket).env("LC_ALL", "C");
        command.env("PGDATABASE", "postgres").env("PGUSER", "admin").env("HOME", &self.socket).env("PGPORT", "5432");
        command.uid(self.account.0).gid(self.account.1);
        command
    }

    fn run(&self, cluster: &Cluster, program: &str, words: &[&str]) -> Outcome {
        process::run(&mut self.command(cluster, program, words), LIMIT)
    }

    fn query(&self, cluster: &Cluster, text: &str) -> String {
        let outcome = self.run(cluster, "psql", &["-X", "-A", "-t", "-c", text]);
        outcome.must_succeed(text).trim().to_owned()
    }

    fn data_text(&self) -> String {
        self.data.display().to_string()
    }

    fn log_path(&self) -> String {
        self.socket.join("log").display().to_string()
    }

    /// Takes the locks of a killed server away. Where nobody reaps orphans, its id still answers and looks alive.
    fn remove_dead_lock(&self) {
        let lock = self.data.join("postmaster.pid");
        let Ok(text) = std::fs::read_to_string(&lock) else { return };
        let pid: u32 = text.lines().next().and_then(|line| line.parse().ok()).expect("the lock names a process");
        assert!(!process::is_alive(pid), "PostgreSQL still runs");
        std::fs::remove_file(lock).expect("remove the lock");
        let _ = std::fs::remove_file(self.socket.join(".s.PGSQL.5432.lock"));
    }

    /// Starts it; tries again while the file system says that somebody else still has a file.
    fn start(&self, cluster: &Cluster) {
        let options = format!("-k {} -c listen_addresses= -c fsync=on", self.socket.display());
        let words = ["-D", &self.data_text(), "-l", &self.log_path(), "-o", &options, "-w", "-t", "60", "start"];
        process::poll("PostgreSQL starts", RECOVERY_LIMIT, || {
            self.remove_dead_lock();
            let outcome = self.run(cluster, "pg_ctl", &words);
            if outcome.code != 0 {
                let log = std::fs::read_to_string(self.log_path()).unwrap_or_default();
                let tail: Vec<&str> = log.lines().rev().take(5).collect();
                eprintln!("PostgreSQL did not start: {}\n{}", outcome.text().trim(), tail.join("\n"));
            }
            (outcome.code == 0).then_some(())
        });
    }

    /// Process ids of the server and of everything it started.
    fn pids(&self) -> Vec<u32> {
        let wanted = self.data_text();
        let all = std::fs::read_dir("/proc").expect("list processes").flatten();
        let pids: Vec<u32> = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        let read = |pid: u32, name: &str| std::fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let is_server = |pid: u32| {
            let words = read(pid, "cmdline");
            let words = String::from_utf8_lossy(&words).into_owned();
            words.contains("bin/postgres") && words.contains(&wanted)
        };
        let parent = |pid: u32| -> Option<u32> {
            let stat = String::from_utf8_lossy(&read(pid, "stat")).into_owned();
            stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
        };
        let servers: Vec<u32> = pids.iter().copied().filter(|pid| is_server(*pid)).collect();
        let children = pids.iter().copied().filter(|pid| parent(*pid).is_some_and(|id| servers.contains(&id)));
        servers.iter().copied().chain(children).collect()
    }

    fn kill(&self) {
        let pids = self.pids();
        pids.iter().for_each(|pid| process::signal(*pid, libc::SIGKILL));
        process::poll("PostgreSQL is gone", Duration::from_secs(60), || {
            pids.iter().all(|pid| !process::is_alive(*pid)).then_some(())
        });
    }

    /// What every pgbench transaction keeps true: all sums are the sum of the history.
    fn check(&self, cluster: &Cluster) -> u64 {
        let sums = self.query(
            cluster,
            "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history) \
             and (select sum(tbalance) from pgbench_tellers) = (select sum(delta) from pgbench_history) \
             and (select sum(bbalance) from pgbench_branches) = (select sum(delta) from pgbench_history) \
             and (select count(*) from pgbench_accounts) = 100000",
        );
        assert_eq!(sums, "t", "the sums differ");
        self.query(cluster, "select count(*) from pgbench_history").parse().expect("a number")
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        self.pids().iter().for_each(|pid| process::signal(*pid, libc::SIGKILL));
    }
}

/// Transactions that pgbench says were committed.
fn committed(text: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix("number of transactions actually processed: "));
    let number: String = line.expect("pgbench says it").chars().take_while(char::is_ascii_digit).collect();
    number.parse().expect("a number")
}

/// Runs pgbench until `disturb` ended it with the database; gives the transactions it saw committed.
fn bench_until(database: &Database, cluster: &mut Cluster, disturb: impl FnOnce(&mut Cluster)) {
    let words = ["-n", "-c", "4", "-j", "2", "-T", "600"];
    let mut command = database.command(cluster, "pgbench", &words);
    command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    process::die_with_test(&mut command, libc::SIGKILL);
    let mut child = command.spawn().expect("start pgbench");
    let before = database.check(cluster);
    process::poll("transactions go on", LIMIT, || (database.check(cluster) > before + 200).then_some(()));
    disturb(cluster);
    // Left to itself it may wait for a server that is gone for good.
    child.kill().and_then(|()| child.wait()).expect("end pgbench");
}

#[test]
fn postgres_recovers_from_its_own_crash_and_from_that_of_its_mount() {
    needs_fuse!();
    let (Some(bin), Some(account), true) = (find(), account(), is_root()) else {
        eprintln!("skipped: PostgreSQL is not installed, or this is not root");
        return;
    };
    let mut cluster = Cluster::start(Duration::from_secs(600));
    let (base, socket) = (cluster.mount().join("pg"), cluster.beside("pg"));
    for dir in [&base, &socket] {
        std::fs::create_dir(dir).expect("make a directory");
        std::os::unix::fs::chown(dir, Some(account.0), Some(account.1)).expect("give it away");
    }
    let database = Database { bin, account, data: base.join("data"), socket };
    let words = ["-D", &database.data_text(), "-U", "admin", "-A", "trust", "-E", "UTF8"];
    database.run(&cluster, "initdb", &words).must_succeed("initdb");
    database.start(&cluster);
    database.run(&cluster, "pgbench", &["-i", "-q", "-s", "1"]).must_succeed("pgbench -i");
    let bench = database.run(&cluster, "pgbench", &["-n", "-c", "4", "-j", "2", "-t", "250"]);
    let acknowledged = committed(&bench.must_succeed("pgbench"));
    assert_eq!(database.check(&cluster), acknowledged);

    bench_until(&database, &mut cluster, |_| database.kill());
    database.start(&cluster);
    let after_crash = database.check(&cluster);
    assert!(after_crash >= acknowledged + 200, "committed transactions are gone: {after_crash}");

    bench_until(&database, &mut cluster, |cluster| cluster.kill("mount"));
    database.kill();
    process::unmount_lazily(&cluster.mount());
    remount(&mut cluster);
    database.start(&cluster);
    let after_mount_crash = database.check(&cluster);
    assert!(after_mount_crash >= after_crash + 200, "committed transactions are gone: {after_mount_crash}");
    let words = ["-D", &database.data_text(), "-m", "fast", "-w", "stop"];
    database.run(&cluster, "pg_ctl", &words).must_succeed("pg_ctl stop");
    eprintln!("transactions: {acknowledged}, {after_crash} after its crash, {after_mount_crash} after the mount's");
}

fn remount(cluster: &mut Cluster) {
    let dir = cluster.mount();
    cluster.run_by_hand("mount", &["mount", "--foreground", &dir.display().to_string()]);
    process::poll("it is mounted again", Duration::from_secs(60), || {
        (process::is_mounted(Path::new(&dir)) && std::fs::read_dir(&dir).is_ok()).then_some(())
    });
}
