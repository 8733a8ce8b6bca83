//! System tests: real processes of the released executable under real tools and real crashes.
//!
//! Run with `cargo build --release -p cairn && cargo test --release -p cairn-tests -- --test-threads=1`; `CAIRN_BIN`
//! names another executable, `CAIRN_TEST_DIR` another place for the clusters, `CAIRN_FSX_SECONDS` how long the random
//! operations of `fsx` go on. Long variants: `-- --ignored`.

mod by_hand;
mod chaos;
mod crash;
mod disaster;
mod fsx;
mod full;
mod full_mds;
mod guards;
mod memory;
mod mounting;
mod nbd;
mod old_copy;
mod postgres;
mod quickstart;
mod replaced;
mod stopped;
mod tools;
mod upgrade;
mod virtual_machine;

/// Ends the test, as passed, with a word why when a tool is not installed.
macro_rules! needs {
    ($($tool:literal),+) => {
        if !cairn_tests::process::have_tools(&[$($tool),+]) {
            return;
        }
    };
}
use needs;

/// Ends the test, as passed, where nothing can be mounted.
macro_rules! needs_fuse {
    () => {
        if !std::path::Path::new("/dev/fuse").exists() {
            eprintln!("skipped: this machine has no /dev/fuse");
            return;
        }
    };
}
use needs_fuse;
