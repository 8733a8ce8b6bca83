//! Configuration parameters of the cluster: one table with defaults, ranges and explanations.

use crate::command::Answer;
use crate::kv::Kv;
use crate::state::{Meta, short};
use cairn_stdx::planted;
use cairn_wire::mds::{MdsError, MdsReply, Severity};
use std::collections::BTreeMap;

/// One parameter; all are whole numbers.
#[derive(Clone, Copy, Debug)]
pub struct Parameter {
    /// Key.
    pub key: &'static str,
    /// Default.
    pub default: u64,
    /// Smallest value.
    pub min: u64,
    /// Largest value.
    pub max: u64,
    /// What it does, with its unit.
    pub doc: &'static str,
}

/// All parameters, ascending by key.
pub const PARAMETERS: &[Parameter] = &[
    Parameter {
        key: "mds.alloc.fill_margin",
        default: 5,
        min: 0,
        max: 50,
        doc: "Per cent of each chunk server kept free of new data, for repair.",
    },
    Parameter {
        key: "mds.alloc.strict_failure_domain",
        default: 1,
        min: 0,
        max: 1,
        doc: "1: never two copies of a chunk in one failure domain; 0: rather there than nowhere.",
    },
    Parameter {
        key: "mds.alloc.strict_tier",
        default: 0,
        min: 0,
        max: 1,
        doc: "1: data never leave their tier; 0: a full tier spills to lower, then to higher ones.",
    },
    Parameter {
        key: "mds.events.kept",
        default: 10_000,
        min: 100,
        max: 1_000_000,
        doc: "Events kept in the log of events.",
    },
    Parameter {
        key: crate::recover::HOLD,
        default: 0,
        min: 0,
        max: 1,
        doc: "1: no copy is deleted or overwritten by the cluster itself; set by recover-metadata until an operator has \
              looked at its report.",
    },
    Parameter {
        key: crate::rebalance::GAP,
        default: 10,
        min: 1,
        max: 100,
        doc: "Difference, in per cent of their capacity, between the fullest and the emptiest chunk server of a tier at \
              which copies begin to move; they do until it is half of it; 100: never.",
    },
    Parameter {
        key: crate::rebalance::MOVES,
        default: 2,
        min: 1,
        max: 256,
        doc: "Copies moved to one chunk server at a time to balance space.",
    },
    Parameter {
        key: "mds.wd.max_offline_cs",
        default: 2,
        min: 0,
        max: 10_000,
        doc: "Offline chunk servers, of hosts that are not offline as a whole, beyond which copying waits for an operator; \
              2 % of all if that is more; 0: no limit.",
    },
    Parameter {
        key: "mds.wd.max_offline_cs_hosts",
        default: 2,
        min: 0,
        max: 10_000,
        doc: "Hosts offline as a whole beyond which copying waits for an operator; 5 % of all if that is more; 0: no limit.",
    },
    Parameter {
        key: "mds.wd.offline_tout",
        default: 300,
        min: 10,
        max: 86_400,
        doc: "Seconds of silence after which a chunk server is offline and its chunks are copied elsewhere.",
    },
    Parameter {
        key: "mds.wd.rebuilds_per_cs",
        default: 32,
        min: 1,
        max: 256,
        doc: "Copies made on one chunk server at a time.",
    },
    Parameter {
        key: "mds.wd.verify_chunks",
        default: 2,
        min: 0,
        max: 10_000,
        doc: "Chunks verified per minute and chunk server.",
    },
];

/// All parameters with their values.
pub(crate) fn list(set: &BTreeMap<String, u64>) -> Vec<(String, String)> {
    let value = |parameter: &Parameter| set.get(parameter.key).copied().unwrap_or(parameter.default);
    PARAMETERS.iter().map(|parameter| (parameter.key.to_owned(), value(parameter).to_string())).collect()
}

/// Number of single-letter changes between two words (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<u8> = b.bytes().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let cost = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = cost.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

fn unknown(key: &str) -> MdsError {
    let short = short(key);
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    let near: Vec<&str> = PARAMETERS
        .iter()
        .map(|parameter| parameter.key)
        .filter(|known| distance(&last(&short), &last(known)) <= 3 || (short.len() > 2 && known.contains(&short)))
        .collect();
    let hint =
        if near.is_empty() { "see the list of all".to_owned() } else { format!("did you mean {}?", near.join(" or ")) };
    MdsError::Invalid(format!("there is no parameter `{short}`; {hint}"))
}

/// The key and number of a pair that may be set.
fn check(key: &str, value: &str) -> Result<(&'static str, u64), MdsError> {
    let parameter = PARAMETERS.iter().find(|parameter| parameter.key == key).ok_or_else(|| unknown(key))?;
    let number = value.parse().ok().filter(|number| (parameter.min..=parameter.max).contains(number));
    number.map(|number| (parameter.key, number)).ok_or_else(|| {
        let Parameter { min, max, doc, .. } = parameter;
        MdsError::Invalid(format!("{key} is a number from {min} to {max}: {doc}"))
    })
}

impl<K: Kv> Meta<K> {
    /// Value of a parameter, `mds.wd.offline_tout` for instance.
    ///
    /// # Panics
    /// When there is no such parameter.
    pub fn config(&self, key: &str) -> u64 {
        let parameter = PARAMETERS.iter().find(|parameter| parameter.key == key).expect("a known parameter");
        self.globals.config.get(key).copied().unwrap_or(parameter.default)
    }

    /// True while no copy is to be deleted or overwritten: the metadata were recovered, and an operator is to look
    /// first.
    pub(crate) fn on_hold(&self) -> bool {
        let held = self.globals.config.get(crate::recover::HOLD).is_some_and(|value| *value != 0);
        held && !planted!("recover_hold_ignored")
    }

    /// What waited for the operator goes on: every chunk is looked at again.
    fn hold_changed(&mut self) {
        let servers: Vec<_> = self.servers.keys().copied().collect();
        servers.into_iter().for_each(|cs| self.sweep_start(cs));
    }

    /// Sets all of the parameters, or none when one is wrong.
    pub(crate) fn config_set(&mut self, pairs: &[(String, String)]) -> Answer {
        let checked: Vec<(&'static str, u64)> =
            pairs.iter().map(|(key, value)| check(key, value)).collect::<Result<_, _>>()?;
        for (key, value) in checked {
            let before = self.config(key);
            self.globals.config.insert(key.to_owned(), value);
            self.slots = None;
            if key == crate::recover::HOLD && value != before {
                self.hold_changed();
            }
            self.changed();
            self.digest(&cairn_wire::encode(&(key, value)));
            self.event(Severity::Info, "MDS-1010", format!("{key} was set to {value}, it was {before}"));
        }
        Ok(MdsReply::Done)
    }
}
