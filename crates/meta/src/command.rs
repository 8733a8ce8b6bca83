//! What the log carries, and what comes out of applying it.

use cairn_types::{ClientId, ClusterId, CsId, Level, MdsId};
use cairn_wire::mds::{Call, ClusterEvent, CsState, MdsCondition, MdsError, MdsInfo, MdsReply, MdsRequest, Push};
use serde::{Deserialize, Serialize};

/// One command of the log. Variants are only ever appended. The first byte of each in the log is the lowest level that
/// knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// The first command of a cluster: its identity, its root directory, its first metadata server. Once.
    Bootstrap {
        /// Identity.
        cluster: ClusterId,
        /// Name.
        name: String,
        /// The first metadata server.
        first: MdsInfo,
        /// The leader's clock.
        wall_ns: u64,
    },
    /// A call of a client or a server.
    Call {
        /// The call.
        call: Call,
        /// The leader's clock.
        wall_ns: u64,
    },
    /// A session has not renewed for its term: it ends, but its leases stay where they are until
    /// [`Command::LeasesFree`].
    SessionExpired {
        /// The session.
        client: ClientId,
    },
    /// The term of an ended session has passed by the leader's monotonic clock, counted from the last renewal that any
    /// leader may have answered: its leases may be granted anew.
    LeasesFree {
        /// The session.
        client: ClientId,
    },
    /// A chunk server is silent: inactive at first, offline after `mds.wd.offline_tout`.
    CsSilent {
        /// The server.
        cs: CsId,
        /// [`CsState::Inactive`] or [`CsState::Offline`].
        state: CsState,
        /// The leader's clock.
        wall_ns: u64,
    },
    /// A chunk server is there again; heartbeats and registrations say the same.
    CsBack {
        /// The server.
        cs: CsId,
        /// The leader's clock.
        wall_ns: u64,
    },
    /// A metadata server votes from now on, or no longer.
    MdsVoter {
        /// The server.
        mds: MdsId,
        /// It votes.
        voter: bool,
        /// The leader's clock.
        wall_ns: u64,
    },
    /// A metadata server has left the group.
    MdsLeft {
        /// The server.
        mds: MdsId,
        /// The leader's clock.
        wall_ns: u64,
    },
    /// Time passes: a bounded piece of the background work is done.
    Tick {
        /// The leader's clock.
        wall_ns: u64,
    },
    /// What ails a metadata server has changed, as its leader sees it.
    MdsCondition {
        /// The server.
        mds: MdsId,
        /// What ails it now.
        condition: MdsCondition,
        /// Bytes free on the disk of its repository.
        free: u64,
        /// Entries of the log it lacks.
        lacks: u64,
        /// Seconds for which it has accepted nothing.
        silent_s: u64,
        /// The leader's clock.
        wall_ns: u64,
    },
    /// A metadata server leads from now on.
    MdsLeads {
        /// The server.
        mds: MdsId,
        /// Since this term.
        term: u64,
        /// The leader's clock.
        wall_ns: u64,
    },
}

/// Bytes that are no command.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// Of another level.
    #[error("a command of {found}, and this server is of {reads}")]
    Level {
        /// The level that knows it.
        found: Level,
        /// The highest one that may be read here.
        reads: Level,
    },
    /// Not one whole command.
    #[error("malformed command: {0}")]
    Malformed(#[from] cairn_wire::MessageError),
}

impl Command {
    /// The lowest level that knows the command.
    pub fn level(&self) -> Level {
        match self {
            Self::Call { call, .. } => match call.request {
                // A stamp is one byte; what is beyond it is beyond every server.
                MdsRequest::LevelRaise { level } => level.min(Level(u32::from(u8::MAX))),
                ref request => request.level(),
            },
            _ => Level::FIRST,
        }
    }

    /// The bytes for the log.
    pub fn encode(&self) -> Vec<u8> {
        self.encode_at(self.level())
    }

    /// The bytes for the log with another stamp: a cluster is at the level of its first command.
    pub fn encode_at(&self, level: Level) -> Vec<u8> {
        let stamp = u8::try_from(level.0).expect("levels are small");
        postcard::to_extend(self, vec![stamp]).expect("every command can be encoded")
    }

    /// The command in these bytes and its stamp, for one who knows all levels up to `reads`.
    ///
    /// # Errors
    /// [`CommandError`] when they are not exactly one command of a known level.
    pub fn decode(bytes: &[u8], reads: Level) -> Result<(Level, Self), CommandError> {
        let (&stamp, body) = bytes.split_first().unwrap_or((&0, &[]));
        let found = Level(u32::from(stamp));
        if found < Level::FIRST || found > reads {
            return Err(CommandError::Level { found, reads });
        }
        Ok((found, cairn_wire::decode("command", body)?))
    }
}

/// What a call was answered.
pub type Answer = Result<MdsReply, MdsError>;

/// Whom a push is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Recipient {
    /// One session.
    Session(ClientId),
    /// One chunk server.
    Cs(CsId),
    /// Every session and chunk server.
    Everyone,
}

/// What the shell of a leader does after a command was applied; followers drop it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetaEffect {
    /// Send news.
    Push {
        /// To whom.
        to: Recipient,
        /// The news.
        push: Push,
    },
    /// An event was added to the log of events.
    Event(ClusterEvent),
    /// A session ended by force: close its link, and once its term has passed propose [`Command::LeasesFree`].
    SessionEnded(ClientId),
    /// A metadata server was admitted: add it to the group as a learner, promote it when it has caught up.
    MdsAdmitted(MdsInfo),
    /// A metadata server is to leave: remove it from the group, then propose [`Command::MdsLeft`].
    MdsRemoving(MdsId),
}

/// The outcome of one command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// The answer of a call; [`MdsReply::Done`] for all else.
    pub reply: Answer,
    /// What to do.
    pub effects: Vec<MetaEffect>,
}
