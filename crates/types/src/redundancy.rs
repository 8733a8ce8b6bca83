//! Redundancy schemes and failure domains: `replicas=N[:M]`, `failure-domain=host`.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Most replicas a chunk may have (R0114).
pub const REPLICAS_MAX: u8 = 15;

/// How many copies a chunk has, and below how many its writes wait.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Redundancy {
    replicas: u8,
    minimum: u8,
}

/// A redundancy scheme that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RedundancyError {
    /// Not of the form `N` or `N:M`.
    #[error("`{text}` is not N or N:M, as in replicas=3 or replicas=3:2")]
    Syntax {
        /// What was given.
        text: String,
    },
    /// Outside `1..=15`, or more required than kept.
    #[error("replicas={replicas}:{minimum} is out of range: 1 <= minimum <= replicas <= 15")]
    Range {
        /// Normal number of copies asked for.
        replicas: u64,
        /// Minimum number of copies asked for.
        minimum: u64,
    },
}

impl Redundancy {
    /// `replicas` copies, writes wait below `minimum`.
    ///
    /// # Errors
    /// [`RedundancyError::Range`] unless `1 <= minimum <= replicas <= 15`.
    pub fn new(replicas: u8, minimum: u8) -> Result<Self, RedundancyError> {
        if minimum < 1 || minimum > replicas || replicas > REPLICAS_MAX {
            return Err(RedundancyError::Range { replicas: u64::from(replicas), minimum: u64::from(minimum) });
        }
        Ok(Self { replicas, minimum })
    }

    /// The minimum when none is given (D08): `max(1, N - 1)` for `N <= 3`, else the majority.
    pub fn derived_minimum(replicas: u8) -> u8 {
        if replicas <= 3 { replicas.saturating_sub(1).max(1) } else { replicas / 2 + 1 }
    }

    /// The normal number of copies.
    pub fn replicas(self) -> u8 {
        self.replicas
    }

    /// Below this many current copies writes wait (rule 4).
    pub fn minimum(self) -> u8 {
        self.minimum
    }
}

impl Default for Redundancy {
    /// Three copies, two required.
    fn default() -> Self {
        Self { replicas: 3, minimum: 2 }
    }
}

impl fmt::Display for Redundancy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.replicas, self.minimum)
    }
}

impl FromStr for Redundancy {
    type Err = RedundancyError;

    fn from_str(text: &str) -> Result<Self, RedundancyError> {
        let number = |part: &str| -> Result<u64, RedundancyError> {
            part.parse().map_err(|_| RedundancyError::Syntax { text: text.to_owned() })
        };
        let (replicas, minimum) = match text.split_once(':') {
            Some((n, m)) => (number(n)?, Some(number(m)?)),
            None => (number(text)?, None),
        };
        let narrow = |n: u64, m: u64| RedundancyError::Range { replicas: n, minimum: m };
        let n = u8::try_from(replicas).map_err(|_| narrow(replicas, minimum.unwrap_or(1)))?;
        let m = match minimum {
            Some(m) => u8::try_from(m).map_err(|_| narrow(replicas, m))?,
            None => Self::derived_minimum(n),
        };
        Self::new(n, m)
    }
}

/// The level of the topology tree on which two copies of a chunk must differ.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
pub enum FailureDomain {
    /// Different disks, perhaps of one host.
    Disk,
    /// Different hosts (the default, R0115).
    #[default]
    Host,
    /// Different racks.
    Rack,
    /// Different rows.
    Row,
    /// Different rooms.
    Room,
    /// Different sites.
    Site,
}

impl FailureDomain {
    /// All levels from the narrowest to the widest.
    pub const ALL: [FailureDomain; 6] = [Self::Disk, Self::Host, Self::Rack, Self::Row, Self::Room, Self::Site];

    /// The word used in attributes and on screens.
    pub fn name(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Host => "host",
            Self::Rack => "rack",
            Self::Row => "row",
            Self::Room => "room",
            Self::Site => "site",
        }
    }
}

impl fmt::Display for FailureDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for FailureDomain {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|level| level.name() == text)
            .ok_or_else(|| format!("`{text}` is not a failure domain; choose one of disk, host, rack, row, room, site"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_minimum_is_derived_as_documented() {
        let derived: Vec<String> = (1..=6).map(|n| n.to_string().parse::<Redundancy>().unwrap().to_string()).collect();
        assert_eq!(derived, ["1:1", "2:1", "3:2", "4:3", "5:3", "6:4"]);
    }

    #[test]
    fn impossible_schemes_are_refused_by_name() {
        for bad in ["0", "16", "2:3", "3:0", "300", "3:", "x", "3:2:1", ""] {
            assert!(bad.parse::<Redundancy>().is_err(), "{bad}");
        }
    }
}
