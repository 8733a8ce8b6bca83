//! The planted-bug switch: known mistakes that can be turned on to prove that a checker sees them.
//!
//! A core asks `planted!("ack_before_sync")` at the place of the mistake. In a normal build the macro is the constant
//! `false` and the branch disappears; only with the feature `planted` (never in a release) does it consult the
//! thread-local choice made by the simulator. Each name is listed in `sim/src/planted.rs` with the invariant that must
//! catch it.

#[cfg(feature = "planted")]
thread_local! {
    static ACTIVE: std::cell::Cell<Option<&'static str>> = const { std::cell::Cell::new(None) };
}

/// Turns one planted bug on for this thread, or all off with `None`. Without the feature this does nothing.
pub fn activate(name: Option<&'static str>) {
    #[cfg(feature = "planted")]
    ACTIVE.with(|active| active.set(name));
    #[cfg(not(feature = "planted"))]
    let _ = name;
}

/// True when this build can plant bugs at all.
pub const fn available() -> bool {
    cfg!(feature = "planted")
}

/// True when the planted bug `name` is on. Use through [`crate::planted!`].
#[inline(always)]
pub fn is_active(name: &str) -> bool {
    #[cfg(feature = "planted")]
    return ACTIVE.with(|active| active.get() == Some(name));
    #[cfg(not(feature = "planted"))]
    {
        let _ = name;
        false
    }
}

/// `planted!("name")`: true when that planted bug is on, the constant `false` in normal builds.
#[macro_export]
macro_rules! planted {
    ($name:literal) => {
        $crate::planted::is_active($name)
    };
}
