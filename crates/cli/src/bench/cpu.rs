//! CPU time and memory of processes, from `/proc`.

use std::path::Path;

/// A server process of a cluster on this machine.
#[derive(Clone, Debug)]
pub struct ServerProcess {
    /// Its process id.
    pub pid: u32,
    /// `mds`, `cs`, `mount` or `nbd`.
    pub role: String,
}

/// The processes of this executable on this machine that serve the repositories below `dir` or, without one, all.
pub fn servers(roles: &[&str]) -> Vec<ServerProcess> {
    let Ok(own) = std::env::current_exe() else { return Vec::new() };
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let mut found: Vec<ServerProcess> = entries
        .flatten()
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            if std::fs::read_link(entry.path().join("exe")).ok()? != own || pid == std::process::id() {
                return None;
            }
            let command = std::fs::read(entry.path().join("cmdline")).ok()?;
            let words: Vec<&[u8]> = command.split(|&byte| byte == 0).collect();
            let role = roles.iter().find(|role| words.contains(&role.as_bytes()))?;
            Some(ServerProcess { pid, role: (*role).to_owned() })
        })
        .collect();
    found.sort_by_key(|server| server.pid);
    found
}

/// User and system time of a process in microseconds, all its threads.
pub fn cpu_us(pid: u32) -> f64 {
    // schedstat has nanoseconds; stat only has ticks of 10 ms.
    let tasks = Path::new("/proc").join(pid.to_string()).join("task");
    let Ok(entries) = std::fs::read_dir(tasks) else { return 0.0 };
    entries
        .flatten()
        .filter_map(|task| std::fs::read_to_string(task.path().join("schedstat")).ok())
        .filter_map(|text| text.split_whitespace().next()?.parse::<f64>().ok())
        .sum::<f64>()
        / 1000.0
}

/// Resident memory of a process in bytes.
pub fn rss_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Bytes a process has asked the disk to write.
pub fn written_bytes(pid: u32) -> u64 {
    let io = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    let line = io.lines().find(|line| line.starts_with("write_bytes:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|bytes| bytes.parse().ok()).unwrap_or(0)
}

/// A meter over this process and the given servers.
pub struct Meter {
    pids: Vec<u32>,
    start: (f64, f64),
}

impl Meter {
    /// Starts to measure.
    pub fn start(servers: &[ServerProcess]) -> Self {
        let mut meter = Self { pids: servers.iter().map(|server| server.pid).collect(), start: (0.0, 0.0) };
        meter.start = meter.used_us();
        meter
    }

    /// CPU microseconds used since the start by this process, and by the servers together.
    pub fn used_us(&self) -> (f64, f64) {
        let servers = self.pids.iter().map(|&pid| cpu_us(pid)).sum::<f64>();
        (cpu_us(std::process::id()) - self.start.0, servers - self.start.1)
    }
}
