//! Release levels: which releases work together, and what a cluster may use. Why: `docs/design/upgrades.md`.

use serde::{Deserialize, Serialize};
use std::fmt;

/// The level of a release, or of a cluster. It rises by one when a release writes or says something that the one before
/// cannot read.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Level(pub u32);

impl Level {
    /// The first one.
    pub const FIRST: Self = Self(1);
    /// Chunk servers say how busy they are.
    pub const BUSY: Self = Self(2);
    /// Of this release.
    pub const CURRENT: Self = Self::BUSY;
    /// The oldest one this release works with, and whose bytes it reads.
    pub const OLDEST: Self = Self(Self::CURRENT.0 - 1);

    /// The one after this.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// True when processes of the two work together.
    pub fn works_with(self, other: Self) -> bool {
        self.0.abs_diff(other.0) <= 1
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "level {}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::Level;

    #[test]
    fn neighbours_work_together() {
        assert!(Level::CURRENT.works_with(Level::OLDEST) && Level::OLDEST.works_with(Level::CURRENT));
        assert!(Level::CURRENT.works_with(Level::CURRENT.next()));
        assert!(!Level::CURRENT.next().works_with(Level::OLDEST));
    }
}
