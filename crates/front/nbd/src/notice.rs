//! What the operator's log says about connections.

use cairn_nbd_proto::ProtocolError;
use std::fmt;
use std::io;

/// Something worth a line in the log.
#[derive(Debug)]
pub enum Notice {
    /// A client chose an export.
    Started {
        /// Who it is.
        peer: String,
        /// The export.
        export: String,
        /// True when the connection is encrypted.
        tls: bool,
    },
    /// A connection is over.
    Ended {
        /// Who it was.
        peer: String,
        /// The export, if it got that far.
        export: Option<String>,
        /// Why.
        ending: Ending,
    },
    /// A connection was turned away: there are too many.
    TooMany {
        /// Who it was.
        peer: String,
        /// How many are allowed.
        connections_max: usize,
    },
    /// A listener could not accept; it tries again shortly.
    Accept {
        /// What the system said.
        error: io::Error,
    },
}

/// Why a connection is over.
#[derive(Debug)]
pub enum Ending {
    /// The client took its leave.
    Left,
    /// The client closed its end without a word.
    Closed,
    /// The server or the export went away; requests under way were answered.
    ShutDown,
    /// The grace period of a shutdown ended before the requests under way.
    Killed,
    /// The client did not choose an export in time.
    HandshakeTimeout,
    /// The client broke the protocol.
    Protocol(ProtocolError),
    /// The socket or TLS failed.
    Io(io::Error),
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ending::Left => f.write_str("the client left"),
            Ending::Closed => f.write_str("the client closed the connection"),
            Ending::ShutDown => f.write_str("the export was shut down or lost its volume"),
            Ending::Killed => f.write_str("cut off with requests under way"),
            Ending::HandshakeTimeout => f.write_str("no export was chosen in time"),
            Ending::Protocol(error) => write!(f, "protocol error: {error}"),
            Ending::Io(error) => write!(f, "connection failed: {error}"),
        }
    }
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Notice::Started { peer, export, tls } => {
                write!(f, "{peer} uses export `{export}`{}", if *tls { " over TLS" } else { "" })
            }
            Notice::Ended { peer, export: Some(export), ending } => write!(f, "{peer} on export `{export}`: {ending}"),
            Notice::Ended { peer, export: None, ending } => write!(f, "{peer}: {ending}"),
            Notice::TooMany { peer, connections_max } => {
                write!(f, "{peer} turned away: {connections_max} connections are open already")
            }
            Notice::Accept { error } => write!(f, "accept failed: {error}"),
        }
    }
}
