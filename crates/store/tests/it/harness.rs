//! A store on a simulated disk, driven one completion at a time, and the model it is compared with.

use cairn_env::{BufMut, DiskRequest, IoId};
use cairn_env_sim::SimDisk;
use cairn_stdx::Rng;
use cairn_stdx::checksum::crc64;
use cairn_store::*;
use cairn_types::*;
use std::collections::BTreeMap;

pub const NOW: Instant = Instant(0);
pub const BLOCK: usize = 4096;
pub const UUID: [u8; 16] = [7; 16];
pub const CLUSTER: ClusterId = ClusterId([9; 16]);

/// The volume of chunks that only take up space.
pub const FILLER: VolumeId = VolumeId(77);

pub type Answer = Result<StoreReply, StoreError>;

/// A block that says who wrote it: volume-wide unique `stamp`, chunk and block number.
pub fn block_of(chunk: ChunkId, block: u32, stamp: u64) -> [u8; BLOCK] {
    let mut bytes = [0u8; BLOCK];
    let mut rng = Rng::new(stamp);
    bytes[..8].copy_from_slice(&stamp.to_le_bytes());
    bytes[8..16].copy_from_slice(&chunk.0.to_le_bytes());
    bytes[16..20].copy_from_slice(&block.to_le_bytes());
    // Something in every sector, so that torn blocks differ.
    for sector in 1..8 {
        bytes[sector * 512..sector * 512 + 8].copy_from_slice(&rng.next_u64().to_le_bytes());
    }
    bytes
}

/// The stamp of a block that was read; zero for zeros. Panics on anything that was never written there (I2).
pub fn stamp_of(chunk: ChunkId, block: u32, bytes: &[u8]) -> u64 {
    let stamp = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    if stamp == 0 {
        assert!(bytes == [0; BLOCK], "I2: {chunk} block {block} is torn");
        return 0;
    }
    assert_eq!(bytes, block_of(chunk, block, stamp), "I2: {chunk} block {block} holds something else");
    stamp
}

pub fn options() -> StoreOptions {
    StoreOptions { cluster: Some(CLUSTER), store_uuid: Some(UUID), ..StoreOptions::default() }
}

/// Options that make everything happen often.
pub fn tight_options() -> StoreOptions {
    StoreOptions { cache_bytes: 1, dirty_leaves_max: 12, chain_groups_max: 24, chain_blocks_max: 200, ..options() }
}

pub struct World {
    pub disk: SimDisk,
    pub store: Store,
    pub options: StoreOptions,
    pub rng: Rng,
    pub out: StoreOutput,
    pub answers: BTreeMap<u64, Answer>,
    pub notices: Vec<Notice>,
    pub next_token: u64,
}

impl World {
    pub fn formatted(size: u64) -> SimDisk {
        let mut disk = SimDisk::new(size);
        let config = StoreConfig { cluster: CLUSTER, store_uuid: UUID, capacity_bytes: 0 };
        for (i, op) in format(&config, size).unwrap().into_iter().enumerate() {
            disk.submit(DiskRequest { io: IoId(i as u64), op });
            disk.complete(IoId(i as u64)).unwrap().result.unwrap();
        }
        disk
    }

    pub fn new(size: u64, seed: u64, options: StoreOptions) -> Self {
        let mut world = Self::on(Self::formatted(size), seed, options);
        world.open().unwrap();
        world
    }

    pub fn on(disk: SimDisk, seed: u64, options: StoreOptions) -> Self {
        let store = Store::new(disk.size(), options.clone());
        Self {
            disk,
            store,
            options,
            rng: Rng::new(seed),
            out: StoreOutput::default(),
            answers: BTreeMap::new(),
            notices: Vec::new(),
            next_token: 1,
        }
    }

    /// Opens a fresh store on the disk as it is.
    pub fn open(&mut self) -> Result<OpenReport, OpenError> {
        self.store = Store::new(self.disk.size(), self.options.clone());
        self.out = StoreOutput::default();
        self.store.start(NOW, &mut self.out);
        loop {
            self.pass_on();
            if let Some(opened) = self.out.opened.take() {
                return opened;
            }
            let Some(done) = self.disk.complete_next(&mut self.rng) else { panic!("opening hangs") };
            self.store.disk_done(NOW, done, &mut self.out);
            self.store.turn(NOW, &mut self.out);
        }
    }

    fn pass_on(&mut self) {
        for request in self.out.disk.drain(..) {
            self.disk.submit(request);
        }
        for (token, answer) in self.out.done.drain(..) {
            let previous = self.answers.insert(token, answer);
            assert!(previous.is_none(), "token {token} answered twice");
        }
        self.notices.append(&mut self.out.notices);
    }

    pub fn submit(&mut self, request: StoreRequest) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        self.store.submit(NOW, token, request, &mut self.out);
        self.pass_on();
        token
    }

    pub fn turn(&mut self) {
        self.store.turn(NOW, &mut self.out);
        self.pass_on();
    }

    /// Completes one disk request; false when there is none.
    pub fn step(&mut self) -> bool {
        let Some(done) = self.disk.complete_next(&mut self.rng) else { return false };
        self.store.disk_done(NOW, done, &mut self.out);
        self.pass_on();
        true
    }

    /// Completes everything but the requests in `held`.
    pub fn settle_except(&mut self, held: &[IoId]) {
        loop {
            self.turn();
            let next: Vec<IoId> = self.disk.pending().filter(|io| !held.contains(io)).collect();
            let Some(io) = self.rng.choose(&next) else { return };
            let done = self.disk.complete(*io).unwrap();
            self.store.disk_done(NOW, done, &mut self.out);
            self.pass_on();
        }
    }

    /// What `doctor` says about the disk as it is.
    pub fn doctor(&self, deep: bool) -> doctor::Report {
        doctor::check(&mut |offset, len| Ok(self.disk.peek(offset, len)), self.disk.size(), deep)
    }

    /// Runs until nothing moves any more.
    pub fn settle(&mut self) {
        loop {
            self.turn();
            if !self.step() {
                self.turn();
                if self.disk.is_idle() {
                    return;
                }
            }
        }
    }

    pub fn call(&mut self, request: StoreRequest) -> Answer {
        let token = self.submit(request);
        self.settle();
        self.answers.remove(&token).expect("every request is answered")
    }

    pub fn create(&mut self, chunk: u64, volume: u64, block_count: u32) -> Answer {
        self.call(create(chunk, volume, block_count))
    }

    /// Reads blocks and returns their stamps.
    pub fn read_stamps(&mut self, chunk: ChunkId, first_block: u32, block_count: u32) -> Result<Vec<u64>, StoreError> {
        let reply = self.call(StoreRequest::Read { chunk, first_block, block_count })?;
        let StoreReply::Data(data) = reply else { panic!("a read answers with data") };
        Ok(stamps(chunk, first_block, &data))
    }

    /// Chunks that belong to the workload, not to what fills the disk.
    pub fn visible_chunks(&self) -> Vec<(ChunkId, u32)> {
        let wanted = self.store.chunks().filter(|(_, info)| info.volume != FILLER);
        wanted.map(|(id, info)| (id, info.block_count)).collect()
    }

    /// All stamps of all chunks, versions included: what a reader can see.
    pub fn dump(&mut self) -> BTreeMap<(ChunkId, u32), u64> {
        let chunks: Vec<(ChunkId, u32)> = self.visible_chunks();
        let mut all = BTreeMap::new();
        for (chunk, block_count) in chunks {
            let mut first = 0;
            while first < block_count {
                let count = (block_count - first).min(REQUEST_BLOCKS_MAX);
                let stamps = self.read_stamps(chunk, first, count).unwrap_or_else(|e| panic!("read {chunk}: {e}"));
                all.extend(stamps.into_iter().enumerate().map(|(i, s)| ((chunk, first + i as u32), s)));
                first += count;
            }
        }
        all
    }
}

pub fn stamps(chunk: ChunkId, first_block: u32, data: &ReadData) -> Vec<u64> {
    let pieces: Vec<&[u8]> = data.data.iter().map(|piece| &piece[..]).collect();
    let bytes = pieces.concat();
    assert_eq!(bytes.len(), data.checksums.len() * BLOCK);
    let blocks = bytes.chunks_exact(BLOCK).zip(&data.checksums).enumerate();
    blocks
        .map(|(i, (block, checksum))| {
            assert_eq!(crc64(block), *checksum, "the checksum belongs to the block");
            stamp_of(chunk, first_block + i as u32, block)
        })
        .collect()
}

pub fn create(chunk: u64, volume: u64, block_count: u32) -> StoreRequest {
    StoreRequest::CreateChunk {
        chunk: ChunkId(chunk),
        volume: VolumeId(volume),
        layer: LayerId(1),
        index: chunk,
        block_count,
        version: ChunkVersion(1),
        tag: vec![chunk as u8; 5],
    }
}

/// A write of `count` blocks, all with the same stamp.
pub fn write(chunk: u64, first: u32, count: u32, stamp: u64, durable: bool) -> StoreRequest {
    let mut data = BufMut::zeroed(count as usize * BLOCK);
    for (i, out) in data.chunks_exact_mut(BLOCK).enumerate() {
        out.copy_from_slice(&block_of(ChunkId(chunk), first + i as u32, stamp));
    }
    StoreRequest::Write {
        chunk: ChunkId(chunk),
        version: ChunkVersion(1),
        epoch: Epoch(1),
        sequence: Sequence(stamp),
        first_block: first,
        checksums: data.chunks_exact(BLOCK).map(crc64).collect(),
        data: data.freeze(),
        durable,
    }
}

pub fn unmap(chunk: u64, first: u32, count: u32, stamp: u64) -> StoreRequest {
    StoreRequest::Unmap {
        chunk: ChunkId(chunk),
        version: ChunkVersion(1),
        epoch: Epoch(1),
        sequence: Sequence(stamp),
        first_block: first,
        block_count: count,
        durable: false,
    }
}
