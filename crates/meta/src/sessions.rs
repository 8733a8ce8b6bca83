//! Sessions: who calls, and that each of its calls takes effect once (I18).
//!
//! A session remembers the answers its client has not acknowledged. A call number seen before is answered from there;
//! one that was acknowledged is refused, so that a packet from long ago does nothing.

use crate::command::{Answer, MetaEffect};
use crate::keys;
use crate::kv::Kv;
use crate::record::{Session, SessionState};
use crate::state::{Meta, short};
use cairn_stdx::planted;
use cairn_types::{ClientId, HostId, InodeId, VolumeId};
use cairn_wire::mds::{Call, MdsError, MdsReply, MdsRequest, SessionKind, Severity};
use std::collections::BTreeMap;

/// How long a session lasts without renewal.
pub const SESSION_TERM_MS: u32 = 10_000;
/// How many calls of a session may be unacknowledged.
pub const SESSION_WINDOW: u64 = 256;
/// Leases and handles of an ended session cleared in one step.
pub(crate) const SESSION_CLEAR_STEP: usize = 512;

impl<K: Kv> Meta<K> {
    pub(crate) fn session_open(
        &mut self,
        kind: SessionKind,
        host: HostId,
        host_name: String,
        purpose: String,
        nonce: u64,
    ) -> Answer {
        let cluster = self.globals.identity.as_ref().expect("checked before dispatch").cluster;
        let known = self
            .sessions
            .iter()
            .find(|(_, session)| session.nonce == nonce && session.host == host && session.state == SessionState::Live);
        let client = match known {
            Some((client, _)) => *client,
            None => {
                let client = ClientId(self.globals.next_client);
                self.globals.next_client += 1;
                let session = Session {
                    kind,
                    host,
                    host_name: short(&host_name),
                    purpose: short(&purpose),
                    nonce,
                    state: SessionState::Live,
                    acknowledged: 0,
                    leases: 0,
                    replies: BTreeMap::new(),
                    dirty: true,
                };
                self.sessions.insert(client, session);
                self.changed();
                self.digest(&client.0.to_le_bytes());
                client
            }
        };
        Ok(MdsReply::Session { client, term_ms: SESSION_TERM_MS, cluster })
    }

    /// A call of a session: executed once, however often it arrives.
    pub(crate) fn session_call(&mut self, call: Call) -> Answer {
        let client = call.session;
        let ended = MdsError::SessionEnded(client);
        let Some(session) = self.sessions.get_mut(&client).filter(|session| session.state == SessionState::Live) else {
            return Err(ended);
        };
        match call.request {
            MdsRequest::SessionRenew => return Ok(MdsReply::Done),
            MdsRequest::SessionClose => return self.session_close(client),
            _ => {}
        }
        let forget_rename =
            planted!("rename_retry_executes_again") && matches!(call.request, MdsRequest::Rename { .. });
        if let Some(reply) = session.replies.get(&call.sequence).filter(|_| !forget_rename) {
            return cairn_wire::decode("remembered answer", reply).expect("encoded by ourselves");
        }
        if call.sequence == 0 {
            return Err(MdsError::Invalid("a changing call carries a number".into()));
        }
        if call.sequence <= session.acknowledged {
            return Err(MdsError::Refused(format!("call {} was answered and acknowledged", call.sequence)));
        }
        let acknowledged = session.acknowledged.max(call.acknowledged.min(call.sequence - 1));
        if call.sequence > acknowledged + SESSION_WINDOW {
            return Err(MdsError::Refused(format!("more than {SESSION_WINDOW} calls without acknowledgement")));
        }
        if acknowledged > session.acknowledged {
            session.acknowledged = acknowledged;
            session.replies = session.replies.split_off(&(acknowledged + 1));
        }
        let answer = self.execute(client, call.wall_ns, call.request);
        let reply = cairn_wire::encode(&answer);
        self.digest(&reply);
        // A session that revoked itself is still there, only no longer live.
        if let Some(session) = self.sessions.get_mut(&client) {
            session.replies.insert(call.sequence, reply);
            session.dirty = true;
        }
        answer
    }

    fn session_close(&mut self, client: ClientId) -> Answer {
        self.session_state(client, SessionState::Freeing { clean: true });
        self.session_clear(client, SESSION_CLEAR_STEP);
        Ok(MdsReply::Done)
    }

    /// Ends a live session; its leases stay until [`Meta::session_free`].
    pub(crate) fn session_end(&mut self, client: ClientId) {
        let live = self.sessions.get(&client).filter(|session| session.state == SessionState::Live);
        let Some((host, purpose, leases)) =
            live.map(|session| (session.host_name.clone(), session.purpose.clone(), session.leases))
        else {
            return;
        };
        self.session_state(client, SessionState::Ended);
        let text = format!("session {client} ({purpose} on {host}) ended without closing; it held {leases} leases");
        self.event(Severity::Warning, "MDS-2001", text);
        self.effect(MetaEffect::SessionEnded(client));
    }

    pub(crate) fn session_revoke(&mut self, client: ClientId) -> Answer {
        if !self.sessions.contains_key(&client) {
            return Err(MdsError::NotFound(format!("session {client}")));
        }
        self.changed();
        self.session_end(client);
        Ok(MdsReply::Done)
    }

    /// The term of an ended session has passed: its leases are void from now on, and cleared away step by step.
    pub(crate) fn session_free(&mut self, client: ClientId) {
        if self.sessions.get(&client).is_some_and(|session| session.state == SessionState::Ended) {
            self.session_state(client, SessionState::Freeing { clean: false });
            self.session_clear(client, SESSION_CLEAR_STEP);
        }
    }

    fn session_state(&mut self, client: ClientId, state: SessionState) {
        let session = self.sessions.get_mut(&client).expect("found by the caller");
        session.state = state;
        session.replies.clear();
        session.dirty = true;
        self.changed();
        self.digest(&client.0.to_le_bytes());
    }

    /// Clears away at most `limit` leases and handles of a session whose leases are void, and the session itself when
    /// nothing is left. Returns how many.
    pub(crate) fn session_clear(&mut self, client: ClientId, limit: usize) -> usize {
        let prefix = keys::one(keys::LEASE, client.0);
        let leases = self.kv.scan(&prefix, &keys::after(&prefix), limit);
        for (key, _) in &leases {
            self.delete(key);
            let volume = VolumeId(keys::number(key, 9));
            if let Ok(mut inode) = self.inode(InodeId(volume.0)) {
                // Another session may have taken the void lease over already; then there is nothing to clear.
                if self.lease_settle(&mut inode.lease) {
                    self.put_inode(InodeId(volume.0), &inode);
                }
                self.free_if_orphan(InodeId(volume.0), inode);
            }
        }
        let prefix = keys::one(keys::HANDLE_OF, client.0);
        let handles = self.kv.scan(&prefix, &keys::after(&prefix), limit - leases.len());
        for (key, _) in &handles {
            self.drop_handles(client, InodeId(keys::number(key, 9)));
        }
        if leases.len() + handles.len() < limit {
            self.sessions.remove(&client);
            self.changed();
            self.kv.delete(&keys::one(keys::SESSION, client.0));
        }
        leases.len() + handles.len()
    }

    /// True while a session may call; the shell renews it without a log entry.
    pub fn session_alive(&self, client: ClientId) -> bool {
        self.sessions.get(&client).is_some_and(|session| session.state == SessionState::Live)
    }

    /// Every session whose term the leader watches: live ones expire when silent ([`crate::Command::SessionExpired`]);
    /// ended ones (`false`) wait for [`crate::Command::LeasesFree`].
    pub fn sessions(&self) -> impl Iterator<Item = (ClientId, bool)> + '_ {
        self.sessions.iter().filter_map(|(client, session)| match session.state {
            SessionState::Live => Some((*client, true)),
            SessionState::Ended => Some((*client, false)),
            SessionState::Freeing { .. } => None,
        })
    }
}
