//! What a volume waits for, in words: one line per thing that is not at rest.

use super::ops::Kind;
use super::write::Body;
use super::{Fence, State, Volume};
use crate::servers::Servers;

impl Volume {
    /// Lines that say why operations of this volume have not ended yet; none when it is at rest.
    pub(crate) fn explain(&self, servers: &Servers) -> Vec<String> {
        if self.is_settled() && self.state == State::Open && !self.paused {
            return Vec::new();
        }
        let (unsettled, bytes) = self.tracker.load();
        let mut lines = vec![format!(
            "{} {}: {:?}{}, {} operations, {} parts, {unsettled} unsettled writes ({bytes} bytes) from {}, {} held, \
             {} throttled, {} settles unanswered{}",
            self.id,
            self.epoch,
            self.state,
            if self.paused { ", paused" } else { "" },
            self.ops.len(),
            self.parts.keys().len(),
            self.tracker.settled() + 1,
            self.held_ops.len(),
            self.throttled.len(),
            self.settles_unanswered,
            self.reconcile.as_ref().map(|r| format!(", reconciling: {}", r.explain())).unwrap_or_default(),
        )];
        lines.extend(self.tracker.explain().map(|line| format!("  {line}")));
        for slot in self.all_slots() {
            let server = self.server(slot);
            let known = if server.fence == Fence::Yes { "fenced" } else { "not fenced" };
            let excused = if server.excused { ", excused" } else { "" };
            let failing = if server.failing { ", being reported as failed" } else { "" };
            lines.push(format!(
                "  slot {slot} {}: {known}{excused}{failing}, {} chunks wait; {}",
                server.cs,
                server.chunks.len(),
                servers.explain(server.number)
            ));
        }
        let mut ops: Vec<u64> = self.ops.keys().copied().collect();
        ops.sort_unstable();
        for id in ops {
            let op = &self.ops[&id];
            let kind = match &op.kind {
                Kind::Flush { waiting, upto } => format!("flush up to {upto} waits for slots {waiting:?}"),
                Kind::Read { offset, len } => format!("read {offset}+{len}"),
                Kind::Write { offset, data, .. } => format!("write {offset}+{}", data.len()),
                Kind::Zero { offset, len, .. } => format!("zero {offset}+{len}"),
                Kind::Compare { offset, data, .. } => format!("compare and write {offset}+{}", data.len()),
                Kind::Extents { offset, len, .. } => format!("extents {offset}+{len}"),
                Kind::Copy { block, count, sources, .. } => {
                    format!("copy block {block}+{count} from slots {sources:?}")
                }
            };
            lines.push(format!("  operation {id}: {kind}, {} parts left", op.left));
        }
        for (id, part) in self.parts.iter() {
            let body = match &part.body {
                Body::Read(read) => {
                    format!("read at slot {:?}, attempt {}, bad {:?}", read.at, read.attempt, read.bad)
                }
                Body::Write(write) => write.explain(),
                Body::Extents { next, .. } => format!("extents from {next}"),
            };
            lines.push(format!(
                "  part {id:x} of operation {}: chunk {} block {}+{}{}, {body}",
                part.op,
                part.index,
                part.first,
                part.count,
                if part.revived { ", sent again" } else { "" }
            ));
        }
        for index in &self.chunk_order {
            let chunk = &self.chunks[index];
            if chunk.active > 0 || chunk.unsettled > 0 || !chunk.waiting.is_empty() {
                lines.push(format!("  chunk {index}: {}", chunk.explain()));
            }
        }
        lines
    }
}
