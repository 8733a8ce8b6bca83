//! A disk that is only read: what a core writes to it stays in memory. For tools that open a store or a log to look at
//! it, and must not change the only copy there is.

use cairn_env::{Buf, BufMut, DISK_ALIGNMENT, DiskDone, DiskError, DiskErrorKind, DiskOp, DiskRequest};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

const PAGE: usize = DISK_ALIGNMENT as usize;

/// A file or block device, read, with what was written since over it.
#[derive(Debug)]
pub struct OfflineDisk {
    file: File,
    size: u64,
    written: BTreeMap<u64, Buf>,
}

impl OfflineDisk {
    /// Opens a file or block device for reading.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // A block device says its size only to who seeks to its end.
        let size = (&file).seek(SeekFrom::End(0))?;
        Ok(Self { file, size, written: BTreeMap::new() })
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Carries out a request.
    pub fn run(&mut self, request: DiskRequest) -> DiskDone {
        let result = match request.op {
            DiskOp::Read { offset, len } => self.read(offset, len),
            DiskOp::Write { offset, bufs } => self.write(offset, &bufs),
            DiskOp::Flush | DiskOp::Discard { .. } => Ok(Buf::default()),
        };
        DiskDone { io: request.io, result }
    }

    fn read(&self, offset: u64, len: u32) -> Result<Buf, DiskError> {
        let mut buf = BufMut::zeroed(len as usize);
        self.file.read_exact_at(&mut buf, offset).map_err(|_| DiskError {
            operation: "read",
            offset,
            len: u64::from(len),
            kind: DiskErrorKind::Io,
        })?;
        for (at, page) in self.written.range(offset..offset + u64::from(len)) {
            let from = (at - offset) as usize;
            buf[from..from + PAGE].copy_from_slice(page);
        }
        Ok(buf.freeze())
    }

    fn write(&mut self, offset: u64, bufs: &[Buf]) -> Result<Buf, DiskError> {
        let mut at = offset;
        for buf in bufs {
            for start in (0..buf.len()).step_by(PAGE) {
                self.written.insert(at, buf.slice(start, PAGE));
                at += DISK_ALIGNMENT;
            }
        }
        Ok(Buf::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_env::IoId;

    #[test]
    fn what_is_written_is_read_and_the_file_stays_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![7u8; 4 * PAGE]).unwrap();
        let mut disk = OfflineDisk::open(&path).unwrap();
        let mut run = |op| disk.run(DiskRequest { io: IoId(1), op }).result;
        let bufs = vec![Buf::zeroed(PAGE), Buf::copy_from(&vec![9; PAGE])];
        run(DiskOp::Write { offset: DISK_ALIGNMENT, bufs }).unwrap();
        let found = run(DiskOp::Read { offset: 0, len: 4 * PAGE as u32 }).unwrap();
        let pages: Vec<u8> = found.chunks(PAGE).map(|page| page[5]).collect();
        assert_eq!(pages, [7, 0, 9, 7]);
        assert!(run(DiskOp::Read { offset: 4 * DISK_ALIGNMENT, len: PAGE as u32 }).is_err(), "past the end");
        assert_eq!(std::fs::read(&path).unwrap(), vec![7u8; 4 * PAGE]);
    }
}
