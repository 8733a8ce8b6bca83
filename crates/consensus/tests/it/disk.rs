//! A disk whose unflushed 512-byte sectors may be lost one by one.

use cairn_env::{Buf, DiskOp};
use cairn_stdx::Rng;

const SECTOR: usize = 512;

/// Durable bytes and completed writes that no flush has covered yet.
pub struct SimDisk {
    pub durable: Vec<u8>,
    pub volatile: Vec<(u64, Vec<u8>)>,
    write_through: bool,
}

impl SimDisk {
    pub fn new(size: u64, write_through: bool) -> Self {
        Self { durable: vec![0; size as usize], volatile: Vec::new(), write_through }
    }

    fn put(bytes: &mut [u8], offset: u64, data: &[u8]) {
        bytes[offset as usize..offset as usize + data.len()].copy_from_slice(data);
    }

    /// Carries out an operation completely. `flush_covers` is the number of volatile writes when a flush was issued.
    pub fn complete(&mut self, op: &DiskOp, flush_covers: usize) -> Buf {
        match op {
            DiskOp::Read { offset, len } => {
                let (from, to) = (*offset as usize, *offset as usize + *len as usize);
                let mut bytes = self.durable[from..to].to_vec();
                for (at, data) in &self.volatile {
                    let (start, end) = (*at as usize, *at as usize + data.len());
                    let (low, high) = (start.max(from), end.min(to));
                    if low < high {
                        bytes[low - from..high - from].copy_from_slice(&data[low - start..high - start]);
                    }
                }
                Buf::copy_from(&bytes)
            }
            DiskOp::Write { offset, bufs } => {
                let data = bufs.iter().flat_map(|buf| buf.iter().copied()).collect::<Vec<u8>>();
                if self.write_through {
                    Self::put(&mut self.durable, *offset, &data);
                } else {
                    self.volatile.push((*offset, data));
                }
                Buf::default()
            }
            DiskOp::Flush => {
                for (offset, data) in self.volatile.drain(..flush_covers.min(self.volatile.len())) {
                    Self::put(&mut self.durable, offset, &data);
                }
                Buf::default()
            }
            DiskOp::Discard { .. } => Buf::default(),
        }
    }

    /// A write that was in flight when the process died: some of its sectors arrive.
    pub fn tear(&mut self, op: &DiskOp, rng: &mut Rng) {
        if let DiskOp::Write { offset, bufs } = op {
            let data = bufs.iter().flat_map(|buf| buf.iter().copied()).collect::<Vec<u8>>();
            let keep = rng.below(5);
            for (i, sector) in data.chunks(SECTOR).enumerate() {
                if rng.below(4) < keep {
                    self.volatile.push((*offset + (i * SECTOR) as u64, sector.to_vec()));
                }
            }
        }
    }

    /// The power goes: any subset of the sectors that no flush covered is lost.
    pub fn cut(&mut self, rng: &mut Rng) {
        let keep = rng.below(5);
        for (offset, data) in std::mem::take(&mut self.volatile) {
            for (i, sector) in data.chunks(SECTOR).enumerate() {
                if rng.below(4) < keep {
                    Self::put(&mut self.durable, offset + (i * SECTOR) as u64, sector);
                }
            }
        }
    }
}
