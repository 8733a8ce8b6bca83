//! Checkpoints: the memtable moves into the durable image, then the log before it may go.

use crate::base::{Base, ImageMark};
use crate::core::MdsCore;
use cairn_consensus::{Members, SnapshotMeta};
use cairn_types::MdsId;
use cairn_wire::Effects;

/// Entries kept in the log behind the image, so that a server that was away for a moment needs no whole image.
const LOG_TAIL_ENTRIES: u64 = 4096;

/// Memtable size that starts a checkpoint where room is short: small ones find it in what earlier ones left free.
const SHORT_OF_ROOM_BYTES: usize = 256 << 10;

/// The checkpoint under way.
#[derive(Default)]
pub(crate) struct Checkpoint {
    flushing: Option<u64>,
}

/// The members of a mark, for the image and for a lagging server: pairs of id and instance.
pub(crate) fn encode_members(members: &Members) -> Vec<u8> {
    let pairs = |of: &std::collections::BTreeMap<MdsId, u64>| -> Vec<(u64, u64)> {
        of.iter().map(|(id, instance)| (id.0, *instance)).collect()
    };
    cairn_wire::encode(&(pairs(&members.voters), pairs(&members.learners)))
}

/// Reads what [`encode_members`] wrote.
pub(crate) fn decode_members(bytes: &[u8]) -> Option<Members> {
    type Wire = (Vec<(u64, u64)>, Vec<(u64, u64)>);
    let (voters, learners): Wire = cairn_wire::decode("members", bytes).ok()?;
    let map = |pairs: Vec<(u64, u64)>| pairs.into_iter().map(|(id, instance)| (MdsId(id), instance)).collect();
    Some(Members { voters: map(voters), learners: map(learners) })
}

impl ImageMark {
    /// The mark of an image at a place in the log.
    pub(crate) fn of(meta: &SnapshotMeta) -> Self {
        Self { index: meta.index, term: meta.term, members: encode_members(&meta.members) }
    }
}

impl<B: Base> MdsCore<B> {
    /// Ends a checkpoint that has become durable; begins one when the memtable or the log has grown enough.
    pub(crate) fn look_at_checkpoint(&mut self, effects: &mut Effects) {
        if let Some(index) = self.checkpoint.flushing {
            match self.meta.kv_mut().base_mut().poll() {
                None => return,
                Some(Ok(())) => {
                    self.checkpoint.flushing = None;
                    self.meta.kv_mut().flushed();
                    self.consensus.compact(index.saturating_sub(LOG_TAIL_ENTRIES).max(self.log_floor(index)));
                }
                Some(Err(error)) if error.damaged => crate::base::give_up(error),
                Some(Err(error)) => {
                    effects.fatal = Some(format!("{error}; this server cannot keep its state and stops"));
                    return;
                }
            }
        }
        if self.images.installing() {
            return;
        }
        let status = self.consensus.status();
        let log_full = status.live_bytes > self.config.log.leader_live_max() / 2;
        let changed = self.meta.kv().active_bytes();
        let index = self.meta.kv().base().mark().index;
        let wanted = self.backups.wants_checkpoint(index) || self.images.wants_checkpoint(index);
        let short = self.meta.kv().base().room().short;
        let bytes_max = self.config.checkpoint_bytes.min(if short { SHORT_OF_ROOM_BYTES } else { usize::MAX });
        if !(wanted || changed > 0 && (log_full || changed > bytes_max)) {
            return;
        }
        let Some(meta) = self.consensus.snapshot_meta(self.applied) else { return };
        let (_, changes) = self.meta.freeze();
        self.meta.kv_mut().base_mut().begin_flush(ImageMark::of(&meta), changes);
        self.checkpoint.flushing = Some(meta.index);
    }

    /// When the log is short of room all of it up to the image goes, else a tail stays for servers that lag a little.
    fn log_floor(&self, index: u64) -> u64 {
        let status = self.consensus.status();
        if status.live_bytes > self.config.log.leader_live_max() / 4 { index } else { 0 }
    }
}
