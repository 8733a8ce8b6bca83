//! The release level this process runs at.

use cairn_types::Level;
use std::sync::OnceLock;

/// Makes a process behave as one of the release before, for tests of upgrades: its level, from [`Level::OLDEST`] on.
const VARIABLE: &str = "CAIRN_RELEASE_LEVEL";

/// The level this process runs at: [`Level::CURRENT`], unless a test wants an older one.
pub fn release_level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let wanted = std::env::var(VARIABLE).ok().and_then(|text| text.trim().parse().ok()).map(Level);
        wanted.filter(|level| (Level::OLDEST..=Level::CURRENT).contains(level)).unwrap_or(Level::CURRENT)
    })
}
