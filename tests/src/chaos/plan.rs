//! What goes wrong in a round, drawn from a seed, and how each of it begins and ends.
//!
//! Whatever only stops or cuts something may overlap with anything: it costs time, never data. What damages data
//! (rot, a failing disk) happens to one host of a round, and a round begins with all copies whole.

use super::lab::{FAULT_DISK_HOSTS, HOSTS, Lab, NBD_PORT, SERVER_HOSTS};
use super::load::{Load, Place};
use crate::fault_disk::DiskFault;
use crate::hosts::Loss;
use cairn_stdx::Rng;
use std::sync::Arc;

/// Faults begin within this time of a round.
const BEGIN_MS_MAX: u64 = 14_000;
/// Lease of a session; a stop may be longer.
const LEASE_MS: u64 = 10_000;

/// Something that goes wrong.
#[derive(Clone, Debug)]
pub enum Fault {
    /// A host hears nobody, or is not heard, or both.
    Isolate {
        /// The host.
        host: usize,
        /// It hears nobody.
        deaf: bool,
        /// Nobody hears it.
        mute: bool,
    },
    /// One host does not hear one other.
    Cut {
        /// The sender.
        from: usize,
        /// The receiver.
        to: usize,
    },
    /// Every link loses packets.
    Lossy {
        /// In per cent.
        percent: u8,
    },
    /// All connections of a host break.
    Reset {
        /// The host.
        host: usize,
    },
    /// SIGSTOP, and SIGCONT at the end.
    Stop {
        /// The process.
        label: String,
    },
    /// `kill -9`, and a new start at the end.
    Kill {
        /// The process.
        label: String,
    },
    /// `kill -9` of all processes of a host.
    KillHost {
        /// The host.
        host: usize,
    },
    /// A disk errs; at the end its chunk server is started anew.
    Disk {
        /// The host.
        host: usize,
        /// What it does wrong.
        fault: DiskFault,
    },
    /// Bits turn on the disk of a stopped chunk server.
    Rot {
        /// The host.
        host: usize,
        /// In so many blocks.
        blocks: usize,
    },
    /// The host of the export stops, and the export is started on the other one; at the end the first goes on.
    TakeOver,
}

/// A fault and when.
#[derive(Clone, Debug)]
pub struct Step {
    /// Begins so long after the round.
    pub at_ms: u64,
    /// Lasts so long.
    pub lasts_ms: u64,
    /// What.
    pub fault: Fault,
}

/// One round.
#[derive(Clone, Debug)]
pub struct Round {
    /// Before anything else the disk of this host is lost and replaced.
    pub replaces: Option<usize>,
    /// In the order of their beginning.
    pub steps: Vec<Step>,
    /// At the end everything is killed at once.
    pub kill_everything: bool,
}

fn duration(rng: &mut Rng) -> u64 {
    if rng.chance(1, 3) { rng.range(LEASE_MS + 1_000, LEASE_MS + 5_000) } else { rng.range(300, 5_000) }
}

/// Draws a round; `export` is the process that serves the volume at its beginning.
pub fn draw(rng: &mut Rng, export: &str) -> Round {
    let mut steps = Vec::new();
    let moves = rng.chance(1, 4);
    let mut labels: Vec<String> = ["a", "b", "c"].iter().map(|host| format!("mds-{host}")).collect();
    labels.extend(HOSTS[..SERVER_HOSTS].iter().map(|host| format!("cs-{host}")));
    labels.push("mount-y".to_owned());
    if moves {
        let lasts_ms = rng.range(LEASE_MS + 4_000, LEASE_MS + 8_000);
        steps.push(Step { at_ms: rng.below(3_000), lasts_ms, fault: Fault::TakeOver });
    } else {
        labels.push(export.to_owned());
        labels.push(export.to_owned());
    }
    match rng.below(5) {
        0 => {
            let fault = Fault::Rot { host: rng.below(SERVER_HOSTS as u64) as usize, blocks: rng.range(1, 5) as usize };
            steps.push(Step { at_ms: 0, lasts_ms: rng.range(200, 2_000), fault });
        }
        1 | 2 => {
            let host = *rng.choose(&FAULT_DISK_HOSTS).expect("there are some");
            let fault = Fault::Disk { host, fault: *rng.choose(&DiskFault::ALL).expect("there are some") };
            steps.push(Step { at_ms: rng.below(4_000), lasts_ms: rng.range(1_000, 9_000), fault });
        }
        _ => {}
    }
    for _ in 0..rng.range(2, 6) {
        let any = rng.below(HOSTS.len() as u64) as usize;
        let other = (any + rng.range(1, HOSTS.len() as u64) as usize) % HOSTS.len();
        let label = rng.choose(&labels).expect("there are some").clone();
        let fault = match rng.below(12) {
            0 | 1 => {
                let deaf = rng.chance(2, 3);
                Fault::Isolate { host: any, deaf, mute: !deaf || rng.chance(1, 2) }
            }
            2 => Fault::Cut { from: any, to: other },
            3 => Fault::Lossy { percent: rng.range(3, 30) as u8 },
            4 => Fault::Reset { host: any },
            5..=7 => Fault::Stop { label },
            8..=10 => Fault::Kill { label },
            _ => Fault::KillHost { host: rng.below(SERVER_HOSTS as u64) as usize },
        };
        steps.push(Step { at_ms: rng.below(BEGIN_MS_MAX), lasts_ms: duration(rng), fault });
    }
    steps.sort_by_key(|step| step.at_ms);
    let replaces = rng.chance(1, 4).then(|| rng.below(SERVER_HOSTS as u64) as usize);
    Round { replaces, steps, kill_everything: rng.chance(1, 4) }
}

fn losses(fault: &Fault) -> Vec<Loss> {
    let all = 0..HOSTS.len();
    let others = |host: usize| all.clone().filter(move |other| *other != host);
    match *fault {
        Fault::Isolate { host, deaf, mute } => {
            let inward = others(host).filter(|_| deaf).map(|from| Loss { from, to: host, percent: 100 });
            let outward = others(host).filter(|_| mute).map(|to| Loss { from: host, to, percent: 100 });
            inward.chain(outward).collect()
        }
        Fault::Cut { from, to } => vec![Loss { from, to, percent: 100 }],
        Fault::Lossy { percent } => {
            let pairs = all.clone().flat_map(|from| others(from).map(move |to| (from, to)));
            pairs.map(|(from, to)| Loss { from, to, percent }).collect()
        }
        _ => Vec::new(),
    }
}

fn other_export(label: &str) -> &'static str {
    if label == "nbd-x" { "nbd-y" } else { "nbd-x" }
}

/// Begins a fault. `export` is the process that serves the volume, and changes when it moves.
pub fn begin(lab: &mut Lab, fault: &Fault, export: &mut String, nbd: &Arc<Load>, rng: &mut Rng) {
    lab.network.lose(&losses(fault));
    match fault {
        Fault::Isolate { .. } | Fault::Cut { .. } | Fault::Lossy { .. } => {}
        Fault::Reset { host } => {
            let count = lab.hosts()[*host].reset_connections();
            lab.note(&format!("{count} connections of host {} are broken", HOSTS[*host]));
        }
        Fault::Stop { label } => lab.signal(label, libc::SIGSTOP),
        Fault::Kill { label } => lab.kill(label, false),
        Fault::KillHost { host } => lab.labels_on(*host).iter().for_each(|label| lab.kill(label, false)),
        Fault::Disk { host, fault } => lab.disk(*host).expect("it has one").set(*fault),
        Fault::Rot { host, blocks } => {
            lab.kill(&format!("cs-{}", HOSTS[*host]), false);
            let turned = lab.rot(*host, *blocks, rng).expect("damage the store");
            lab.note(&format!("a bit turned in {turned} blocks of cs-{}", HOSTS[*host]));
        }
        Fault::TakeOver => {
            lab.signal(export, libc::SIGSTOP);
            let next = other_export(export);
            let host = SERVER_HOSTS + usize::from(next == "nbd-y");
            nbd.moved(Some(Place::Nbd { host, port: NBD_PORT, export: super::lab::EXPORT.to_owned() }));
            lab.start(next);
            *export = next.to_owned();
        }
    }
}

/// Ends a fault.
pub fn end(lab: &mut Lab, fault: &Fault, export: &str) {
    lab.network.keep(&losses(fault));
    match fault {
        Fault::Isolate { .. } | Fault::Cut { .. } | Fault::Lossy { .. } | Fault::Reset { .. } => {}
        Fault::Stop { label } => lab.signal(label, libc::SIGCONT),
        Fault::Kill { label } => lab.start(label),
        Fault::KillHost { host } => lab.labels_on(*host).iter().for_each(|label| lab.start(label)),
        Fault::Disk { host, fault } => {
            let disk = lab.disk(*host).expect("it has one");
            disk.set(DiskFault::None);
            let refused = disk.refused();
            lab.note(&format!("the disk of host {} works again; it refused {refused} requests so far", HOSTS[*host]));
            if *fault != DiskFault::Slow {
                // A store that failed stays stopped until an operator starts it: `docs/design/chunk-server.md`.
                let label = format!("cs-{}", HOSTS[*host]);
                lab.kill(&label, false);
                lab.start(&label);
            }
        }
        Fault::Rot { host, .. } => lab.start(&format!("cs-{}", HOSTS[*host])),
        // The one that slept goes on, and must not do harm.
        Fault::TakeOver => lab.signal(other_export(export), libc::SIGCONT),
    }
}
