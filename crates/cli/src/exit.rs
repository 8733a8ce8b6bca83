//! Exit codes, documented in `docs/guide/cli.md`.

use cairn_client::ConnectError;
use cairn_client::cluster::ClusterFileError;
use cairn_wire::mds::MdsError;

/// Done.
pub const DONE: i32 = 0;
/// Failed; the reason is on stderr.
pub const FAILED: i32 = 1;
/// The arguments make no sense.
pub const USAGE: i32 = 2;
/// No metadata server answers.
pub const UNREACHABLE: i32 = 3;
/// The password or key was refused.
pub const REFUSED: i32 = 4;

/// Arguments that make no sense, where the parser of the command line cannot know it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

/// An error that ends the program with [`USAGE`].
pub fn usage(text: impl Into<String>) -> anyhow::Error {
    anyhow::Error::from(Usage(text.into()))
}

/// The exit code for an error chain.
pub fn code_of(error: &anyhow::Error) -> i32 {
    for cause in error.chain() {
        if let Some(error) = cause.downcast_ref::<ConnectError>() {
            let refused = error.to_string().contains("authentication failed");
            return if refused { REFUSED } else { UNREACHABLE };
        }
        if let Some(MdsError::Unavailable(_)) = cause.downcast_ref::<MdsError>() {
            return UNREACHABLE;
        }
        let invalid = matches!(cause.downcast_ref::<MdsError>(), Some(MdsError::Invalid(_)));
        let bad_name = matches!(cause.downcast_ref::<ClusterFileError>(), Some(ClusterFileError::Name(_)));
        if invalid || bad_name || cause.is::<Usage>() || cause.is::<cairn_fuse::MountArgsError>() {
            return USAGE;
        }
    }
    FAILED
}

/// `cairn stat | head` ends when `head` has seen enough: as other tools do, without a word, and not by a panic.
pub fn leave_quietly_when_nobody_reads() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let text = info.payload().downcast_ref::<String>().map(String::as_str).unwrap_or_default();
        if text.starts_with("failed printing to stdout") {
            std::process::exit(128 + libc::SIGPIPE);
        }
        usual(info);
    }));
}
