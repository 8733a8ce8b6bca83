//! Clients that work on the same few names: what they are told must fit one order.

use super::load::{Kind, Pending};
use super::plan::FaultKind;
use super::{Answer, Scenario, TOKEN_NAMES, Verdict, broken};
use crate::checkers::names::{CallId, Judgement, NAMES, NameOp, NameResult};
use crate::checkers::shadow::Invariant;
use crate::world::MS;
use cairn_client::ClientCore;
use cairn_types::InodeId;
use cairn_wire::mds::{InodeKind, MdsError, MdsReply, MdsRequest, RenameMode};

/// Linux's numbers of the two refusals.
const ENOENT: i32 = 2;
const EEXIST: i32 = 17;
/// Longest pause between two calls of a client.
const PAUSE: u64 = 400 * MS;

fn name(number: usize) -> Vec<u8> {
    format!("shared{number}").into_bytes()
}

fn request(op: NameOp) -> MdsRequest {
    let parent = InodeId::ROOT;
    match op {
        NameOp::Create(at) => MdsRequest::Create {
            parent,
            name: name(at),
            kind: InodeKind::File,
            mode: 0o644,
            uid: 0,
            gid: 0,
            rdev: 0,
            lease: false,
        },
        NameOp::Lookup(at) => MdsRequest::Lookup { parent, name: name(at) },
        NameOp::Unlink(at) => MdsRequest::Unlink { parent, name: name(at) },
        NameOp::Rename(from, to) => MdsRequest::Rename {
            parent,
            name: name(from),
            new_parent: parent,
            new_name: name(to),
            mode: RenameMode::Replace,
        },
    }
}

impl Scenario {
    /// The next call of a client on a name it shares with the others; one at a time.
    pub(super) fn act_on_shared_names(&mut self, client: usize) {
        if !self.chaos {
            return;
        }
        let after = self.names_rng.range(PAUSE / 20, PAUSE);
        self.cluster.world.wake_driver(after, TOKEN_NAMES + client as u64);
        let is_busy = |op: &Pending| op.client == client && matches!(op.kind, Kind::Shared { .. });
        if self.is_idle(client) || self.pending.values().any(is_busy) {
            return;
        }
        let rng = &mut self.names_rng;
        let at = rng.below(NAMES as u64) as usize;
        let op = match rng.below(8) {
            0..3 => NameOp::Create(at),
            3..5 => NameOp::Lookup(at),
            5 => NameOp::Unlink(at),
            _ => NameOp::Rename(at, (at + rng.range(1, NAMES as u64) as usize) % NAMES),
        };
        self.call_on_name(client, op);
    }

    fn call_on_name(&mut self, client: usize, op: NameOp) {
        let call = self.names.begin(self.now(), op);
        let token = self.token();
        self.pending.insert(token, Pending { client, since: self.now(), kind: Kind::Shared { call, op } });
        let (node, mailbox) = (self.cluster.clients[client], self.mailbox.clone());
        self.cluster.world.with::<ClientCore, _>(node, |core, now, out| {
            let done = Box::new(move |result| mailbox.borrow_mut().push((token, Answer::Call(result))));
            core.call(now, request(op), done, out);
        });
    }

    /// Everybody's view at the end.
    pub(super) fn look_at_shared_names(&mut self, client: usize) {
        (0..NAMES).for_each(|at| self.call_on_name(client, NameOp::Lookup(at)));
    }

    pub(super) fn on_shared_name(&mut self, call: CallId, op: NameOp, result: Result<MdsReply, MdsError>) -> Verdict {
        let told = match result {
            Ok(MdsReply::CreatedIn { attr, .. } | MdsReply::Attr(attr)) => NameResult::Inode(attr.inode.0),
            Ok(_) => NameResult::Done,
            Err(MdsError::Posix(errno)) if errno == ENOENT => NameResult::Missing,
            Err(MdsError::Posix(errno)) if errno == EEXIST => NameResult::Exists,
            Err(MdsError::NoSpace(_)) if self.plan.faults.contains(&FaultKind::FullMds) => NameResult::Refused,
            // It may have happened, or may yet.
            Err(MdsError::Unavailable(_) | MdsError::Unknown | MdsError::SessionEnded(_)) => return Ok(()),
            Err(error) => return Err(broken(Invariant::Names, format!("{op:?}: {error}"))),
        };
        self.names.end(self.now(), call, told);
        Ok(())
    }

    pub(super) fn check_shared_names(&mut self) -> Verdict {
        let judgement = self.names.check().map_err(|why| broken(Invariant::Names, why))?;
        self.names_not_judged = judgement == Judgement::NotJudged;
        Ok(())
    }
}
