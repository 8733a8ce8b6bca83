//! State images for servers that lag behind the log: the leader streams its durable image, the other installs it.
//!
//! Frames of kind `Image`: pieces with a prefix go to the lagging server over the leader's link, and an empty frame
//! with the piece's number comes back for each, so that only a window of pieces is ever under way. The receiver
//! announces the image to its log first (`prepare_snapshot`), collects it beside its old state and swaps it in as a
//! whole.

use crate::base::{Base, ImageMark, ImageReader};
use crate::checkpoint::{decode_members, encode_members};
use crate::core::MdsCore;
use cairn_consensus::{SnapshotMeta, SnapshotWanted};
use cairn_types::{MdsId, NodeId};
use cairn_wire::mds::ImagePiece;
use cairn_wire::{Effects, FrameKind, LinkId, Now};
use std::collections::BTreeMap;

/// Bytes of pairs in one piece.
const PIECE_BYTES: usize = 256 << 10;
/// Pieces under way.
const WINDOW: u64 = 4;

struct Sending {
    link: LinkId,
    reader: Box<dyn ImageReader>,
    mark: ImageMark,
    sent: u64,
    acknowledged: u64,
    finished: bool,
}

struct Receiving {
    link: LinkId,
    meta: SnapshotMeta,
    prepared: bool,
    /// Pieces that arrived before the intent was durable, or while one was being written.
    waiting: std::collections::VecDeque<ImagePiece>,
    writing: Option<(u64, bool)>,
    next: u64,
}

/// Images under way.
#[derive(Default)]
pub(crate) struct Images {
    sending: BTreeMap<MdsId, Sending>,
    receiving: Option<Receiving>,
    broken: Vec<MdsId>,
    /// A server waits for an image that stands at least here.
    wanted: u64,
    /// Who offered an image at a moment when it could not be taken.
    declined: Option<LinkId>,
}

impl Images {
    /// True while an image is on its way to a server.
    pub fn is_sending(&self, to: MdsId) -> bool {
        self.sending.contains_key(&to)
    }

    pub fn installing(&self) -> bool {
        self.receiving.is_some()
    }

    /// True while an image at `index` is too old for a server that waits for one.
    pub fn wants_checkpoint(&self, index: u64) -> bool {
        index < self.wanted
    }

    pub fn link_down(&mut self, link: LinkId) {
        self.broken.extend(self.sending.iter().filter(|(_, s)| s.link == link).map(|(id, _)| *id));
        self.declined.take_if(|declined| *declined == link);
        // A receiver whose sender vanished waits for the next offer, which starts from the beginning.
        if let Some(receiving) = self.receiving.as_mut().filter(|r| r.link == link) {
            receiving.waiting.clear();
        }
    }
}

impl<B: Base> MdsCore<B> {
    /// A follower lacks entries that are gone from the log.
    pub(crate) fn image_wanted(&mut self, wanted: &SnapshotWanted, effects: &mut Effects) {
        let reader = self.meta.kv_mut().base_mut().reader();
        let mark = reader.mark();
        // A new server finds itself only in an image that is younger than its admission; without a checkpoint made for
        // it, it would wait until the next one.
        self.images.wanted = self.images.wanted.max(wanted.index_min);
        let Some(link) = self.group.link(wanted.to).filter(|_| mark.index >= wanted.index_min) else {
            return self.consensus.snapshot_sent(wanted.to, false);
        };
        effects.log.push(format!("streams the state at {} to {}", mark.index, wanted.to));
        let sending = Sending { link, reader, mark, sent: 0, acknowledged: 0, finished: false };
        self.images.sending.insert(wanted.to, sending);
        self.send_pieces(wanted.to, effects);
    }

    fn send_pieces(&mut self, to: MdsId, effects: &mut Effects) {
        let Some(sending) = self.images.sending.get_mut(&to) else { return };
        while !sending.finished && sending.sent < sending.acknowledged + WINDOW {
            let pairs = match sending.reader.next_pairs(PIECE_BYTES) {
                Ok(pairs) => pairs,
                Err(error) if error.damaged => crate::base::give_up(error),
                Err(error) => {
                    effects.log.push(format!("streaming the state to {to} failed: {error}"));
                    self.images.broken.push(to);
                    return;
                }
            };
            let last = pairs.is_empty();
            let piece = ImagePiece {
                index: sending.mark.index,
                term: sending.mark.term,
                piece: sending.sent,
                conf_state: if sending.sent == 0 { sending.mark.members.clone() } else { Vec::new() },
                pairs,
                last,
            };
            effects.send(sending.link, FrameKind::Image, sending.sent, cairn_wire::encode(&piece));
            sending.sent += 1;
            sending.finished = last;
        }
    }

    /// A piece for us, or the acknowledgement of one of ours.
    pub(crate) fn image_frame(&mut self, now: Now, link: LinkId, id: u64, bytes: &[u8], effects: &mut Effects) {
        if !matches!(self.calls.peer(link), Some(NodeId::Mds(_))) {
            effects.log.push(format!("link {link:?} sent a piece of a state image and is no metadata server"));
            return self.close(link, effects);
        }
        if bytes.is_empty() {
            return self.piece_acknowledged(link, id, effects);
        }
        let piece: ImagePiece = match cairn_wire::decode("image piece", bytes) {
            Ok(piece) => piece,
            Err(error) => {
                effects.log.push(format!("link {link:?}: {error}"));
                return self.close(link, effects);
            }
        };
        if piece.piece == 0 {
            self.image_offered(link, &piece, effects);
        }
        let wanted = |r: &&mut Receiving| r.meta.index == piece.index && r.link == link;
        if let Some(receiving) = self.images.receiving.as_mut().filter(wanted)
            && receiving.waiting.len() < 2 * WINDOW as usize
        {
            receiving.waiting.push_back(piece);
        }
        self.write_piece(now, effects);
    }

    fn piece_acknowledged(&mut self, link: LinkId, piece: u64, effects: &mut Effects) {
        let Some((&to, sending)) = self.images.sending.iter_mut().find(|(_, s)| s.link == link) else { return };
        sending.acknowledged = sending.acknowledged.max(piece + 1);
        if sending.finished && sending.acknowledged == sending.sent {
            self.images.sending.remove(&to);
            self.consensus.snapshot_sent(to, true);
        } else {
            self.send_pieces(to, effects);
        }
    }

    fn image_offered(&mut self, link: LinkId, piece: &ImagePiece, effects: &mut Effects) {
        let Some(members) = decode_members(&piece.conf_state) else {
            effects.log.push("an offered state image carries no members; ignored".to_owned());
            return;
        };
        let meta = SnapshotMeta { index: piece.index, term: piece.term, members };
        // What is being written to the base cannot be taken back, and without room it takes as long as that lasts: the
        // offer is repeated when the link is closed, afterwards.
        if self.base_is_busy() {
            self.images.declined = Some(link);
            return;
        }
        self.images.declined = None;
        if self.images.receiving.take().is_some() {
            self.consensus.abandon_snapshot(&mut self.out);
        }
        match self.consensus.prepare_snapshot(meta.clone()) {
            Ok(()) => {
                effects.log.push(format!("receives the state at {}", meta.index));
                let waiting = std::collections::VecDeque::new();
                self.images.receiving =
                    Some(Receiving { link, meta, prepared: false, waiting, writing: None, next: 0 });
            }
            Err(error) => effects.log.push(format!("an offered state image is of no use: {error}")),
        }
    }

    /// The intent is durable: the installation may begin.
    pub(crate) fn image_prepared(&mut self, meta: &SnapshotMeta, effects: &mut Effects) {
        let Some(receiving) = self.images.receiving.as_mut().filter(|r| r.meta.index == meta.index) else { return };
        receiving.prepared = true;
        self.meta.kv_mut().base_mut().begin_install();
        effects.log.push(format!("installs the state at {}", meta.index));
    }

    fn write_piece(&mut self, _now: Now, _effects: &mut Effects) {
        let Some(receiving) = self.images.receiving.as_mut() else { return };
        if !receiving.prepared || receiving.writing.is_some() {
            return;
        }
        let Some(piece) = receiving.waiting.pop_front() else { return };
        if piece.piece != receiving.next {
            return;
        }
        receiving.next += 1;
        receiving.writing = Some((piece.piece, piece.last));
        let mark = piece.last.then(|| ImageMark {
            index: receiving.meta.index,
            term: receiving.meta.term,
            members: encode_members(&receiving.meta.members),
        });
        self.meta.kv_mut().base_mut().install(piece.pairs, mark);
    }

    fn base_is_busy(&self) -> bool {
        self.images.receiving.as_ref().is_some_and(|r| r.writing.is_some()) || self.meta.kv().is_flushing()
    }

    /// Goes on with images under way: pieces written, senders gone.
    pub(crate) fn look_at_images(&mut self, effects: &mut Effects) {
        for to in std::mem::take(&mut self.images.broken) {
            if self.images.sending.remove(&to).is_some() {
                self.consensus.snapshot_sent(to, false);
            }
        }
        if !self.base_is_busy()
            && !cairn_stdx::planted!("mds_declined_image_never_asked_again")
            && let Some(link) = self.images.declined.take()
        {
            effects.log.push("can take a state image now: asks for the offer again".to_owned());
            self.close(link, effects);
        }
        loop {
            self.write_piece(Now { mono: cairn_types::Instant(0), wall_ns: 0 }, effects);
            let Some(receiving) = self.images.receiving.as_mut() else { return };
            let Some((piece, last)) = receiving.writing else { return };
            let link = receiving.link;
            match self.meta.kv_mut().base_mut().poll() {
                None => return,
                Some(Err(error)) if error.damaged => crate::base::give_up(error),
                Some(Err(error)) => {
                    effects.fatal = Some(format!("{error}; this server cannot install the state and stops"));
                    return;
                }
                Some(Ok(())) => receiving.writing = None,
            }
            effects.send(link, FrameKind::Image, piece, Vec::new());
            if last {
                self.installed(effects);
            }
        }
    }

    fn installed(&mut self, effects: &mut Effects) {
        let receiving = self.images.receiving.take().expect("an installation ends once");
        match self.consensus.install_snapshot(&receiving.meta, &mut self.out) {
            Ok(()) => {
                self.meta.reload();
                if let Some(level) = self.meta.too_new() {
                    effects.fatal = Some(self.too_new("the state that was received", level));
                    return self.cannot_go_on();
                }
                self.applied = receiving.meta.index;
                self.state_lost = false;
                effects.log.push(format!("the state at {} is installed", receiving.meta.index));
                self.refresh_group();
            }
            Err(error) => effects.fatal = Some(format!("installing the state failed: {error}")),
        }
    }
}
