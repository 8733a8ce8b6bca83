//! The handshake that opens every link: both sides prove that they hold the cluster key, neither reveals it.
//!
//! Three frames: the initiator sends [`Hello`], the responder answers with [`Challenge`], which already carries its
//! proof, and the initiator closes with [`Proof`]. A proof is HMAC-SHA-256 under the cluster key over a role word and
//! the whole transcript (both nonces, both identities, cluster name, protocol version), so nothing can be replayed,
//! reflected or moved to another link. The key is Argon2id of the cluster password salted with the cluster name. What
//! this protects and what it does not: `docs/design/security.md`.

use cairn_types::{ClusterId, Level, NodeId};
use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use std::fmt;

/// Version of the handshake itself; a peer with another one is refused by name. What is spoken after it follows from
/// the release levels of both sides. 2: the levels are told.
pub const PROTOCOL_VERSION: u32 = 2;
/// Shortest password accepted.
pub const PASSWORD_MIN: usize = 8;
/// Longest cluster name.
pub const CLUSTER_NAME_MAX: usize = 63;

/// The secret every node of a cluster shares. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterKey([u8; 32]);

impl fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterKey(hidden)")
    }
}

/// A password that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PasswordError {
    /// Too short.
    #[error("the password has {0} characters; use at least {PASSWORD_MIN}")]
    TooShort(usize),
    /// The name is not allowed.
    #[error("`{0}` is not a cluster name: use 1 to {CLUSTER_NAME_MAX} of a-z A-Z 0-9 - _")]
    Name(String),
}

/// True when `name` may name a cluster (R0044).
pub fn is_cluster_name(name: &str) -> bool {
    (1..=CLUSTER_NAME_MAX).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

impl ClusterKey {
    /// Derives the key from the cluster's name and password: Argon2id (RFC 9106), 19 MiB, 2 passes, 1 lane.
    ///
    /// # Errors
    /// [`PasswordError`] when the name or the password cannot be used.
    pub fn derive(cluster_name: &str, password: &str) -> Result<Self, PasswordError> {
        if !is_cluster_name(cluster_name) {
            return Err(PasswordError::Name(cluster_name.to_owned()));
        }
        if password.chars().count() < PASSWORD_MIN {
            return Err(PasswordError::TooShort(password.chars().count()));
        }
        let params = argon2::Params::new(19 * 1024, 2, 1, Some(32)).expect("constant parameters are valid");
        let argon = argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params);
        let salt = format!("cairn cluster key v1 {cluster_name}");
        let mut key = [0u8; 32];
        argon.hash_password_into(password.as_bytes(), salt.as_bytes(), &mut key).expect("lengths are in range");
        Ok(Self(key))
    }

    /// The key as hexadecimal text, for the key file (mode 0600).
    pub fn to_hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Reads what [`ClusterKey::to_hex`] wrote.
    pub fn from_hex(text: &str) -> Option<Self> {
        let text = text.trim();
        if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        let mut key = [0u8; 32];
        for (i, byte) in key.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
        }
        Some(Self(key))
    }

    fn mac(&self, role: &str, transcript: &[&[u8]]) -> Hmac<Sha256> {
        let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(&self.0).expect("any key length is accepted");
        mac.update(role.as_bytes());
        for part in transcript {
            mac.update(&(part.len() as u64).to_le_bytes());
            mac.update(part);
        }
        mac
    }
}

/// First frame, from the side that connected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`] of the initiator.
    pub protocol: u32,
    /// Release level of the initiator.
    pub level: Level,
    /// Name of the cluster it wants.
    pub cluster_name: String,
    /// Identity of that cluster, once known.
    pub cluster: Option<ClusterId>,
    /// Who it says it is.
    pub node: NodeId,
    /// Fresh random bytes.
    pub nonce: [u8; 32],
}

/// Second frame, from the side that listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Challenge {
    /// Go on: the responder proves itself first.
    Accept {
        /// Who answers.
        node: NodeId,
        /// Its release level.
        level: Level,
        /// Identity of its cluster.
        cluster: ClusterId,
        /// Fresh random bytes.
        nonce: [u8; 32],
        /// Its proof.
        proof: [u8; 32],
    },
    /// No, and why.
    Refuse(AuthError),
}

/// Third frame, from the initiator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    /// Its proof.
    pub proof: [u8; 32],
}

/// Fourth frame: the responder's verdict, so that a wrong password is told as such.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Nothing, or why not.
    pub refused: Option<AuthError>,
}

/// Why a handshake failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum AuthError {
    /// Another protocol version.
    #[error("the peer speaks protocol version {theirs}, this process speaks {ours}; upgrade the older one")]
    Protocol {
        /// The peer's.
        theirs: u32,
        /// Ours.
        ours: u32,
    },
    /// Another cluster answers at this address.
    #[error("the server belongs to cluster `{theirs}`, not `{ours}`; check the address and `-c`")]
    ClusterName {
        /// The server's cluster.
        theirs: String,
        /// The cluster wanted.
        ours: String,
    },
    /// Same name, another cluster: the name was used again.
    #[error("a cluster of the same name but another identity answers ({theirs}, expected {ours}); was it made anew?")]
    ClusterId {
        /// The server's identity.
        theirs: ClusterId,
        /// The identity expected.
        ours: ClusterId,
    },
    /// The peer does not hold the cluster key.
    #[error("authentication failed: the cluster password of one side is wrong; run `cairn -c NAME auth-node` again")]
    Password,
    /// The frames do not follow the handshake.
    #[error("the peer broke the handshake: {0}")]
    Malformed(String),
    /// The releases are too far apart.
    #[error(
        "the release that connects is of {connects}, the one that answers is of {answers}, and only neighbouring levels \
         work together: upgrade the older one, a level at a time (guide: upgrades.md)"
    )]
    Level {
        /// Of the side that connected.
        connects: Level,
        /// Of the side that answered.
        answers: Level,
    },
}

/// The initiator's side.
#[derive(Debug)]
pub struct Initiator {
    key: ClusterKey,
    hello: Hello,
}

/// The responder's side, between its challenge and the initiator's proof.
#[derive(Debug)]
pub struct Responder {
    key: ClusterKey,
    hello: Vec<u8>,
    challenge: Vec<u8>,
    peer: Peer,
}

/// Who is at the other end of a link, once that is proven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Who it is.
    pub node: NodeId,
    /// Its release level.
    pub level: Level,
}

fn transcript_of(peer: Peer, cluster: ClusterId, nonce: &[u8; 32]) -> Vec<u8> {
    crate::encode(&(peer.node, peer.level, cluster, nonce))
}

impl Initiator {
    /// Starts a handshake; `nonce` must be fresh randomness of the operating system.
    pub fn new(key: ClusterKey, cluster_name: &str, cluster: Option<ClusterId>, us: Peer, nonce: [u8; 32]) -> Self {
        let (cluster_name, Peer { node, level }) = (cluster_name.to_owned(), us);
        Self { key, hello: Hello { protocol: PROTOCOL_VERSION, level, cluster_name, cluster, node, nonce } }
    }

    /// The first frame's prefix.
    pub fn hello(&self) -> Vec<u8> {
        crate::encode(&self.hello)
    }

    /// Checks the responder's proof; gives the third frame's prefix, who answered and its cluster.
    ///
    /// # Errors
    /// [`AuthError`]: refused by the responder, or the responder is not what it should be.
    pub fn challenged(&self, bytes: &[u8]) -> Result<(Vec<u8>, Peer, ClusterId), AuthError> {
        let challenge = crate::decode("challenge", bytes).map_err(|error| AuthError::Malformed(error.to_string()))?;
        let (peer, cluster, nonce, proof) = match challenge {
            Challenge::Accept { node, level, cluster, nonce, proof } => (Peer { node, level }, cluster, nonce, proof),
            Challenge::Refuse(error) => return Err(error),
        };
        let (hello, theirs) = (self.hello(), transcript_of(peer, cluster, &nonce));
        let expected = self.key.mac("responder", &[&hello, &theirs]);
        expected.verify_slice(&proof).map_err(|_| AuthError::Password)?;
        if let Some(ours) = self.hello.cluster.filter(|ours| *ours != cluster) {
            return Err(AuthError::ClusterId { theirs: cluster, ours });
        }
        if !self.hello.level.works_with(peer.level) {
            return Err(AuthError::Level { connects: self.hello.level, answers: peer.level });
        }
        let proof = self.key.mac("initiator", &[&hello, &theirs]).finalize().into_bytes().into();
        Ok((crate::encode(&Proof { proof }), peer, cluster))
    }

    /// Reads the responder's verdict.
    ///
    /// # Errors
    /// [`AuthError`] when the responder refuses us.
    pub fn judged(&self, bytes: &[u8]) -> Result<(), AuthError> {
        let verdict: Verdict =
            crate::decode("verdict", bytes).map_err(|error| AuthError::Malformed(error.to_string()))?;
        verdict.refused.map_or(Ok(()), Err)
    }
}

impl Responder {
    /// Answers a hello: the second frame's prefix, and the state to go on with unless it is refused.
    ///
    /// `nonce` must be fresh randomness of the operating system.
    pub fn answer(
        key: &ClusterKey,
        cluster_name: &str,
        cluster: ClusterId,
        us: Peer,
        nonce: [u8; 32],
        bytes: &[u8],
    ) -> (Vec<u8>, Result<Self, AuthError>) {
        let refuse = |error: AuthError| (crate::encode(&Challenge::Refuse(error.clone())), Err(error));
        // The version comes first: of another one nothing else is read.
        if let Some(ours) = postcard::take_from_bytes(bytes).ok().map(|(it, _)| it).filter(|it| *it != PROTOCOL_VERSION)
        {
            return refuse(AuthError::Protocol { theirs: PROTOCOL_VERSION, ours });
        }
        let hello: Hello = match crate::decode("hello", bytes) {
            Ok(hello) => hello,
            Err(error) => return refuse(AuthError::Malformed(error.to_string())),
        };
        if !us.level.works_with(hello.level) {
            return refuse(AuthError::Level { connects: hello.level, answers: us.level });
        }
        if hello.cluster_name != cluster_name {
            return refuse(AuthError::ClusterName { theirs: cluster_name.to_owned(), ours: hello.cluster_name });
        }
        if let Some(wanted) = hello.cluster.filter(|wanted| *wanted != cluster) {
            return refuse(AuthError::ClusterId { theirs: cluster, ours: wanted });
        }
        let ours = transcript_of(us, cluster, &nonce);
        let proof = key.mac("responder", &[bytes, &ours]).finalize().into_bytes().into();
        let Peer { node, level } = us;
        let challenge = crate::encode(&Challenge::Accept { node, level, cluster, nonce, proof });
        let peer = Peer { node: hello.node, level: hello.level };
        (challenge, Ok(Self { key: key.clone(), hello: bytes.to_vec(), challenge: ours, peer }))
    }

    /// Judges the initiator's proof: the fourth frame's prefix, and who the initiator is.
    pub fn judge(self, bytes: &[u8]) -> (Vec<u8>, Result<Peer, AuthError>) {
        let verdict = crate::decode::<Proof>("proof", bytes)
            .map_err(|error| AuthError::Malformed(error.to_string()))
            .and_then(|proof| {
                let expected = self.key.mac("initiator", &[&self.hello, &self.challenge]);
                expected.verify_slice(&proof.proof).map_err(|_| AuthError::Password)
            });
        (crate::encode(&Verdict { refused: verdict.clone().err() }), verdict.map(|()| self.peer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_types::{CsId, MdsId};

    const CS: Peer = Peer { node: NodeId::Cs(CsId(1025)), level: Level::CURRENT };
    const MDS: Peer = Peer { node: NodeId::Mds(MdsId(1)), level: Level::CURRENT };

    fn shake(ours: &ClusterKey, theirs: &ClusterKey, name: &str) -> Result<Peer, AuthError> {
        shake_as(CS, ours, MDS, theirs, name)
    }

    fn shake_as(cs: Peer, ours: &ClusterKey, mds: Peer, theirs: &ClusterKey, name: &str) -> Result<Peer, AuthError> {
        let cluster = ClusterId([7; 16]);
        let initiator = Initiator::new(ours.clone(), name, Some(cluster), cs, [1; 32]);
        let (challenge, responder) = Responder::answer(theirs, "stor1", cluster, mds, [2; 32], &initiator.hello());
        let (proof, node, _) = initiator.challenged(&challenge)?;
        assert_eq!(node, mds);
        let (verdict, peer) = responder?.judge(&proof);
        initiator.judged(&verdict)?;
        peer
    }

    #[test]
    fn both_sides_must_hold_the_key() {
        let key = ClusterKey::derive("stor1", "correct horse").unwrap();
        let other = ClusterKey::derive("stor1", "wrong horse!").unwrap();
        assert_eq!(shake(&key, &key, "stor1"), Ok(CS));
        assert_eq!(shake(&key, &other, "stor1"), Err(AuthError::Password));
        assert!(matches!(shake(&key, &key, "stor2"), Err(AuthError::ClusterName { .. })));
        assert_eq!(ClusterKey::from_hex(&key.to_hex()), Some(key));
    }

    #[test]
    fn a_responder_refuses_a_wrong_proof_and_a_replayed_one() {
        let key = ClusterKey::derive("stor1", "correct horse").unwrap();
        let cluster = ClusterId([7; 16]);
        let initiator = Initiator::new(key.clone(), "stor1", None, CS, [1; 32]);
        let (first, _) = Responder::answer(&key, "stor1", cluster, MDS, [2; 32], &initiator.hello());
        let (proof, ..) = initiator.challenged(&first).unwrap();
        let (_, second) = Responder::answer(&key, "stor1", cluster, MDS, [3; 32], &initiator.hello());
        assert_eq!(second.unwrap().judge(&proof).1, Err(AuthError::Password));
    }

    #[test]
    fn passwords_and_names_are_checked() {
        assert!(matches!(ClusterKey::derive("stor1", "short"), Err(PasswordError::TooShort(5))));
        assert!(matches!(ClusterKey::derive("stor 1", "long enough"), Err(PasswordError::Name(_))));
    }

    #[test]
    fn neighbouring_levels_work_together_and_others_are_refused_by_name() {
        let key = ClusterKey::derive("stor1", "correct horse").unwrap();
        let at = |peer: Peer, level: u32| Peer { level: Level(level), ..peer };
        let shake = |cs, mds| shake_as(at(CS, cs), &key, at(MDS, mds), &key, "stor1");
        assert_eq!(shake(6, 7), Ok(at(CS, 6)));
        assert_eq!(shake(8, 7), Ok(at(CS, 8)));
        for (cs, mds) in [(5, 7), (7, 5)] {
            let refused = shake(cs, mds).unwrap_err();
            assert_eq!(refused, AuthError::Level { connects: Level(cs), answers: Level(mds) });
            assert!(refused.to_string().contains(&format!("connects is of level {cs}")), "{refused}");
        }
    }

    #[test]
    fn another_handshake_is_refused_by_its_number() {
        let key = ClusterKey::derive("stor1", "correct horse").unwrap();
        let hello = crate::encode(&(1u32, "stor1", Some(ClusterId([7; 16])), CS.node, [1u8; 32]));
        let (_, refused) = Responder::answer(&key, "stor1", ClusterId([7; 16]), MDS, [2; 32], &hello);
        assert_eq!(refused.unwrap_err(), AuthError::Protocol { theirs: PROTOCOL_VERSION, ours: 1 });
    }
}
