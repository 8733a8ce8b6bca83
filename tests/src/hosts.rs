//! Hosts as network namespaces: each with an address of its own on one bridge, and filters that lose packets.
//!
//! Everything lies in namespaces made for one run (`cairn<pid>-<number>-…`), the bridge too, so the machine's own
//! network is not touched. Packets are dropped where they arrive, by nftables, so a link can be cut in one direction
//! only.

use crate::process;
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const TOOL_LIMIT: Duration = Duration::from_secs(120);

/// Packets from one host to another that are lost, in per cent; 100 cuts this direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Loss {
    /// Index of the sender.
    pub from: usize,
    /// Index of the receiver.
    pub to: usize,
    /// Share of packets that never arrive.
    pub percent: u8,
}

/// One host.
pub struct Host {
    /// What it is called.
    pub name: String,
    /// Its address.
    pub addr: String,
    namespace: String,
    handle: File,
}

/// All hosts of a run. Dropping it removes the namespaces.
pub struct Network {
    hosts: Vec<Host>,
    switch: String,
    losses: Mutex<BTreeSet<Loss>>,
}

/// False, with a word why, where hosts cannot be made.
pub fn available() -> bool {
    if !process::is_root() {
        eprintln!("skipped: network namespaces are made by root only");
        return false;
    }
    if !process::have_tools(&["ip", "nft", "ss"]) {
        return false;
    }
    // All that a run needs, since a kernel or a container may permit one and not the other.
    let made = Network::new(&["one", "two"]).and_then(|network| {
        network.try_filter(0, "  ip saddr 10.77.0.2 numgen random mod 100 < 50 drop\n")?;
        network.try_filter(0, "")
    });
    if let Err(error) = &made {
        eprintln!("skipped: this machine makes no network namespaces with links and filters: {error}");
    }
    made.is_ok()
}

fn ip(words: &[&str]) -> io::Result<()> {
    let path = process::find_tool("ip").ok_or(io::ErrorKind::NotFound)?;
    let outcome = process::run(Command::new(path).args(words), TOOL_LIMIT);
    if outcome.code == 0 {
        Ok(())
    } else {
        Err(io::Error::other(format!("ip {}: {}", words.join(" "), outcome.text())))
    }
}

fn open(namespace: &str) -> io::Result<File> {
    File::open(format!("/run/netns/{namespace}"))
}

#[expect(unsafe_code, reason = "setns(2)")]
fn enter(namespace: RawFd) -> io::Result<()> {
    // SAFETY: plain system call on an open descriptor; it changes the calling thread only.
    if unsafe { libc::setns(namespace, libc::CLONE_NEWNET) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[expect(unsafe_code, reason = "entering a namespace between fork and exec")]
fn inside(command: &mut Command, namespace: RawFd) {
    // SAFETY: setns is async-signal-safe, and the descriptor stays open until the child was started: it lives in the
    // `Host` that every caller borrows.
    unsafe { command.pre_exec(move || enter(namespace)) };
}

impl Host {
    /// A command that runs on this host.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        inside(&mut command, self.handle.as_raw_fd());
        command
    }

    /// The same host, for another thread.
    pub fn again(&self) -> io::Result<Self> {
        let handle = self.handle.try_clone()?;
        Ok(Self { name: self.name.clone(), addr: self.addr.clone(), namespace: self.namespace.clone(), handle })
    }

    /// Moves the calling thread to this host: the sockets it opens from now on are the host's.
    pub fn enter(&self) -> io::Result<()> {
        enter(self.handle.as_raw_fd())
    }

    /// Breaks every TCP connection of this host, as a firewall does that forgot them; gives how many.
    pub fn reset_connections(&self) -> usize {
        let path = process::find_tool("ss").expect("looked for before");
        let words = ["-K", "-H", "-t", "src", "10.77.0.0/24"];
        process::run(self.command(path).args(words), TOOL_LIMIT).stdout.lines().count()
    }

    fn filter(&self, rules: &str) -> io::Result<()> {
        let path = process::find_tool("nft").expect("looked for before");
        let text = format!(
            "add table inet chaos\ndelete table inet chaos\ntable inet chaos {{\n chain input {{\n  type filter hook \
             input priority 0; policy accept;\n{rules} }}\n}}\n"
        );
        let outcome = process::run_with_input(self.command(path).args(["-f", "-"]), &text, TOOL_LIMIT);
        if outcome.code == 0 { Ok(()) } else { Err(io::Error::other(format!("nft: {}", outcome.text()))) }
    }
}

impl Network {
    /// Makes hosts of these names, all on one bridge.
    pub fn new(names: &[&str]) -> io::Result<Self> {
        remove_what_dead_runs_left();
        // Tests of one process may run at the same time.
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let prefix = format!("cairn{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::SeqCst));
        let switch = format!("{prefix}-switch");
        ip(&["netns", "add", &switch])?;
        let mut network = Self { hosts: Vec::new(), switch: switch.clone(), losses: Mutex::default() };
        ip(&["-n", &switch, "link", "add", "bridge", "type", "bridge"])?;
        ip(&["-n", &switch, "link", "set", "bridge", "up"])?;
        for (index, name) in names.iter().enumerate() {
            let namespace = format!("{prefix}-{name}");
            ip(&["netns", "add", &namespace])?;
            let addr = format!("10.77.0.{}", index + 1);
            let handle = open(&namespace).inspect_err(|_| drop(ip(&["netns", "del", &namespace])))?;
            let name = (*name).to_owned();
            network.hosts.push(Host { name, addr: addr.clone(), namespace: namespace.clone(), handle });
            let port = format!("port{index}");
            ip(&["link", "add", "eth0", "netns", &namespace, "type", "veth", "peer", "name", &port, "netns", &switch])?;
            ip(&["-n", &switch, "link", "set", &port, "master", "bridge", "up"])?;
            ip(&["-n", &namespace, "addr", "add", &format!("{addr}/24"), "dev", "eth0"])?;
            ip(&["-n", &namespace, "link", "set", "eth0", "up"])?;
            ip(&["-n", &namespace, "link", "set", "lo", "up"])?;
        }
        Ok(network)
    }

    /// The hosts, in the order of their names.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Packets are lost as these say, besides what is lost already.
    pub fn lose(&self, more: &[Loss]) {
        let mut losses = self.losses.lock().expect("not poisoned");
        losses.extend(more);
        self.apply(&losses, more);
    }

    /// Takes losses back.
    pub fn keep(&self, fewer: &[Loss]) {
        let mut losses = self.losses.lock().expect("not poisoned");
        losses.retain(|loss| !fewer.contains(loss));
        self.apply(&losses, fewer);
    }

    /// Nothing is lost any more.
    pub fn heal(&self) {
        let mut losses = self.losses.lock().expect("not poisoned");
        let all: Vec<Loss> = std::mem::take(&mut *losses).into_iter().collect();
        self.apply(&losses, &all);
    }

    fn apply(&self, losses: &BTreeSet<Loss>, changed: &[Loss]) {
        let receivers: BTreeSet<usize> = changed.iter().map(|loss| loss.to).collect();
        for to in receivers {
            let rule = |loss: &Loss| {
                let from = &self.hosts[loss.from].addr;
                match loss.percent {
                    100.. => format!("  ip saddr {from} drop\n"),
                    percent => format!("  ip saddr {from} numgen random mod 100 < {percent} drop\n"),
                }
            };
            let rules: String = losses.iter().filter(|loss| loss.to == to).map(rule).collect();
            self.try_filter(to, &rules).expect("the kernel took such rules before");
        }
    }

    fn try_filter(&self, host: usize, rules: &str) -> io::Result<()> {
        self.hosts[host].filter(rules)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for host in &self.hosts {
            let _ = ip(&["netns", "del", &host.namespace]);
        }
        let _ = ip(&["netns", "del", &self.switch]);
    }
}

/// A run that was killed leaves its namespaces.
fn remove_what_dead_runs_left() {
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return };
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let owner = name.strip_prefix("cairn").and_then(|rest| rest.split_once('-')?.0.parse::<u32>().ok());
        if owner.is_some_and(|pid| !process::is_alive(pid)) {
            let _ = ip(&["netns", "del", &name]);
        }
    }
}
