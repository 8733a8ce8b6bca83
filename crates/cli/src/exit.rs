//! Exit codes, documented in `docs/guide/cli.md`.

use cairn_client::ConnectError;
use cairn_client::cluster::ClusterFileError;
use cairn_wire::auth::PasswordError;
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
        let password = cause.is::<PasswordError>();
        if invalid || bad_name || password || cause.is::<Usage>() || cause.is::<cairn_fuse::MountArgsError>() {
            return USAGE;
        }
    }
    FAILED
}

/// An error and its causes, from the outside in. Some errors name their cause themselves; it is not said twice.
pub fn in_words(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.contains(&cause) {
            let colon = if text.is_empty() { "" } else { ": " };
            text = text + colon + &cause;
        }
    }
    text
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[derive(Debug, thiserror::Error)]
    #[error("write {path}: {source}")]
    struct NamesItsCause {
        path: &'static str,
        source: io::Error,
    }

    #[test]
    fn a_cause_is_told_once() {
        let full = || io::Error::from_raw_os_error(libc::ENOSPC);
        let told = in_words(&anyhow::Error::from(NamesItsCause { path: "log", source: full() }).context("start"));
        assert_eq!(told, format!("start: write log: {}", full()));
        assert_eq!(in_words(&anyhow::Error::from(full()).context("write log")), format!("write log: {}", full()));
    }

    #[test]
    fn what_the_arguments_got_wrong_ends_with_2() {
        let short = anyhow::Error::from(PasswordError::TooShort(3)).context("make the key");
        assert_eq!((code_of(&short), code_of(&usage("x")), code_of(&anyhow::anyhow!("x"))), (USAGE, USAGE, FAILED));
        for text in ["::::", "1.2.3.4:x", "1.2.3.4:99999", "", "no such host"] {
            let error = crate::context::address(text, 1).expect_err(text);
            assert_eq!(code_of(&error), USAGE, "{text}: {error:#}");
        }
    }
}
