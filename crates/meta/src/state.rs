//! The state machine itself: opening, applying, querying, checkpoints and digests.

use crate::command::{Answer, Applied, Command, CommandError, MetaEffect, Recipient};
use crate::kv::{BaseKv, Kv, Memtable, Overlay, Pairs};
use crate::placement::Slot;
use crate::record::{Globals, Inode, Server, Session};
use crate::{config, keys};
use cairn_stdx::checksum::crc64;
use cairn_stdx::planted;
use cairn_types::{ChunkId, ClientId, CsId, InodeId, Level, MdsId, VolumeId};
use cairn_wire::mds::{Call, CsState, MdsCondition, MdsError, MdsReply, MdsRequest, Push, Severity};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Errno values used in answers.
pub(crate) mod errno {
    pub const EPERM: i32 = 1;
    pub const ENOENT: i32 = 2;
    pub const EEXIST: i32 = 17;
    pub const ENOTDIR: i32 = 20;
    pub const EISDIR: i32 = 21;
    pub const EINVAL: i32 = 22;
    pub const EFBIG: i32 = 27;
    pub const ENOSPC: i32 = 28;
    pub const EMLINK: i32 = 31;
    pub const ERANGE: i32 = 34;
    pub const ENAMETOOLONG: i32 = 36;
    pub const ENOTEMPTY: i32 = 39;
    pub const ELOOP: i32 = 40;
    pub const ENODATA: i32 = 61;
}

/// A text from outside, cut to what fits into an event or a record.
pub(crate) fn short(text: &str) -> String {
    text.chars().take(255).collect()
}

pub(crate) fn posix(errno: i32) -> MdsError {
    MdsError::Posix(errno)
}

/// The deterministic metadata state machine. See the crate documentation.
#[derive(Debug)]
pub struct Meta<K> {
    pub(crate) kv: K,
    pub(crate) globals: Globals,
    /// The highest level that is read here.
    reads: Level,
    /// The store is above it, and was not read.
    pub(crate) too_new: Option<Level>,
    pub(crate) sessions: BTreeMap<ClientId, Session>,
    pub(crate) servers: BTreeMap<CsId, Server>,
    /// Current copies with a damaged block. Each is replaced, and serves its other blocks until then.
    pub(crate) damaged: BTreeSet<(ChunkId, CsId)>,
    /// Metadata servers that something ails.
    pub(crate) ailing: BTreeMap<MdsId, MdsCondition>,
    /// What placement sees of the servers; rebuilt from `servers` when one of them changed.
    pub(crate) slots: Option<Vec<Slot>>,
    effects: Vec<MetaEffect>,
    map_pushes: BTreeSet<(ClientId, VolumeId)>,
    order_pushes: BTreeSet<CsId>,
    /// Changes made by the command being applied: a refused call makes none.
    writes: u64,
    scratch: Vec<u8>,
    /// A sweep was started by the command being applied; small ones are done at once.
    pub(crate) swept: bool,
}

/// Chunks of a server that changed its state looked at in the same command; the rest is left to ticks.
const SWEEP_INLINE: usize = 1024;

impl<K: Kv> Meta<K> {
    /// Opens the state in `kv`; an empty store is an empty cluster.
    ///
    /// # Panics
    /// When the records are of a later level or damaged: the base store checks its own pages, so this is a bug.
    pub fn open(kv: K) -> Self {
        let meta = Self::open_at(kv, Level::CURRENT);
        assert_eq!(meta.too_new, None, "the metadata state is of a later release");
        meta
    }

    /// Opens the state for a server that knows the levels up to `reads`. A state above is not read:
    /// [`Meta::too_new`] tells, and nothing else may be done with it.
    pub fn open_at(kv: K, reads: Level) -> Self {
        let mut meta = Self {
            kv,
            globals: Globals::default(),
            reads,
            too_new: None,
            sessions: BTreeMap::new(),
            servers: BTreeMap::new(),
            damaged: BTreeSet::new(),
            ailing: BTreeMap::new(),
            slots: None,
            effects: Vec::new(),
            map_pushes: BTreeSet::new(),
            order_pushes: BTreeSet::new(),
            writes: 0,
            scratch: Vec::new(),
            swept: false,
        };
        meta.load();
        meta
    }

    /// Reads the resident records from the store.
    fn load(&mut self) {
        let level = self.kv.view(&[keys::GLOBALS], |bytes| bytes.map(Globals::level_in));
        self.too_new = level.filter(|level| *level > self.reads && !planted!("newer_state_read_as_old"));
        if self.too_new.is_some() {
            return;
        }
        self.globals = self.kv.view(&[keys::GLOBALS], |bytes| bytes.map(decode_record)).unwrap_or_default();
        self.servers.clear();
        self.sessions.clear();
        self.damaged.clear();
        self.ailing.clear();
        self.slots = None;
        for (key, value) in self.kv.scan(&[keys::SERVER], &[keys::SERVER + 1], usize::MAX) {
            let cs = CsId(u32::from_be_bytes(key[1..5].try_into().expect("four bytes")));
            let server = match planted!("newer_state_read_as_old") && self.level() > self.reads {
                // A reader that takes what it finds and leaves what it does not know.
                true => decode_record(&value),
                false => Server::decode(&value, self.level()),
            };
            self.servers.insert(cs, server);
        }
        for (key, _) in self.kv.scan(&[keys::DAMAGED], &[keys::DAMAGED + 1], usize::MAX) {
            let cs = CsId(u32::from_be_bytes(key[1..5].try_into().expect("four bytes")));
            self.damaged.insert((ChunkId(keys::number(&key, 5)), cs));
        }
        for (key, value) in self.kv.scan(&keys::one(keys::AILING, 1), &[keys::AILING + 1], usize::MAX) {
            self.ailing.insert(MdsId(keys::number(&key, 1)), decode_record(&value));
        }
        for (key, value) in self.kv.scan(&[keys::SESSION], &[keys::SESSION + 1], usize::MAX) {
            self.sessions.insert(ClientId(keys::number(&key, 1)), decode_record(&value));
        }
    }

    /// Applies the command in these bytes; those that are no command change nothing but the index. A server does not
    /// get that far with them: [`Command::decode`] and [`Meta::apply_command`].
    pub fn apply(&mut self, index: u64, command: &[u8]) -> Applied {
        self.apply_decoded(index, Command::decode(command, self.reads))
    }

    /// Applies the command at `index` of the log, with its stamp; indexes rise, though not by one (the log has entries
    /// of its own).
    pub fn apply_command(&mut self, index: u64, level: Level, command: Command) -> Applied {
        self.apply_decoded(index, Ok((level, command)))
    }

    fn apply_decoded(&mut self, index: u64, command: Result<(Level, Command), CommandError>) -> Applied {
        assert!(index > self.globals.applied, "index {index} after {}", self.globals.applied);
        self.globals.applied = index;
        self.writes = 0;
        let reply = match command {
            Ok((level, command)) => self.dispatch(level, command),
            Err(error) => Err(MdsError::Invalid(error.to_string())),
        };
        if std::mem::take(&mut self.swept) {
            self.run_sweeps(SWEEP_INLINE);
        }
        for (client, volume) in std::mem::take(&mut self.map_pushes) {
            self.push(Recipient::Session(client), Push::MapChanged { volume });
        }
        for cs in std::mem::take(&mut self.order_pushes) {
            self.push(Recipient::Cs(cs), Push::OrdersWaiting);
        }
        Applied { reply, effects: std::mem::take(&mut self.effects) }
    }

    fn dispatch(&mut self, level: Level, command: Command) -> Answer {
        if let Command::Bootstrap { cluster, name, first, wall_ns } = command {
            if self.globals.identity.is_none() {
                self.globals.version = level.0;
            }
            self.globals.wall_ns = wall_ns;
            return self.bootstrap(cluster, name, first);
        }
        if self.globals.identity.is_none() {
            return Err(MdsError::Unavailable("the cluster is not initialised".into()));
        }
        let raises =
            matches!(&command, Command::Call { call, .. } if matches!(call.request, MdsRequest::LevelRaise { .. }));
        assert!(level <= self.level() || raises, "I15: a command of {level} in a cluster at {}", self.level());
        match command {
            Command::Bootstrap { .. } => unreachable!("handled above"),
            Command::Call { call, wall_ns } => {
                self.globals.wall_ns = wall_ns;
                return self.call(call);
            }
            Command::SessionExpired { client } => self.session_end(client),
            Command::LeasesFree { client } => self.session_free(client),
            Command::CsSilent { cs, state, wall_ns } => {
                self.globals.wall_ns = wall_ns;
                if !matches!(state, CsState::Inactive | CsState::Offline) {
                    return Err(MdsError::Invalid("a silent server is inactive or offline".into()));
                }
                self.cs_silent(cs, state == CsState::Offline);
            }
            Command::CsBack { cs, wall_ns } => {
                self.globals.wall_ns = wall_ns;
                self.cs_back(cs);
            }
            Command::MdsVoter { mds, voter, wall_ns } => {
                self.globals.wall_ns = wall_ns;
                self.mds_voter(mds, voter);
            }
            Command::MdsLeft { mds, wall_ns } => {
                self.globals.wall_ns = wall_ns;
                self.mds_left(mds);
            }
            Command::Tick { wall_ns } => {
                self.globals.wall_ns = wall_ns;
                self.tick(wall_ns);
            }
            Command::MdsCondition { mds, condition, free, lacks, silent_s, wall_ns } => {
                self.globals.wall_ns = wall_ns;
                self.mds_condition_changed(mds, condition, &crate::ailing::Figures { free, lacks, silent_s });
            }
            Command::MdsLeads { mds, term, wall_ns } => {
                self.globals.wall_ns = wall_ns;
                self.mds_leads(mds, term);
            }
        }
        Ok(MdsReply::Done)
    }

    fn call(&mut self, call: Call) -> Answer {
        if call.request.is_read() {
            return self.query(&call.request);
        }
        match call.request {
            MdsRequest::SessionOpen { kind, host, host_name, purpose, nonce } => {
                self.session_open(kind, host, host_name, purpose, nonce)
            }
            MdsRequest::CsRegister(_)
            | MdsRequest::CsJoin { .. }
            | MdsRequest::CsMark { .. }
            | MdsRequest::CsBusy { .. }
            | MdsRequest::CsHeartbeat { .. }
            | MdsRequest::CsReport { .. }
            | MdsRequest::MdsAdd { .. } => self.execute(call.session, call.wall_ns, call.request),
            _ => self.session_call(call),
        }
    }

    /// Executes a call whose session and number were checked. A refused call has changed nothing.
    pub(crate) fn execute(&mut self, client: ClientId, now_ns: u64, request: MdsRequest) -> Answer {
        if let Some(refused) = self.refuse_without_room(&request) {
            return Err(refused);
        }
        let writes = self.writes;
        let answer = self.execute_inner(client, now_ns, request);
        assert!(answer.is_ok() || self.writes == writes, "a refused call changed the state: {answer:?}");
        answer
    }

    fn execute_inner(&mut self, client: ClientId, now_ns: u64, request: MdsRequest) -> Answer {
        use MdsRequest::*;
        match request {
            SessionRevoke { client } => self.session_revoke(client),
            SetAttr { inode, set } => self.set_attr(client, inode, &set, now_ns),
            Create { parent, name, kind, mode, uid, gid, rdev, lease } => {
                let new = crate::namespace::NewInode { kind, mode, uid, gid, rdev, text: Vec::new() };
                self.create(client, parent, &name, new, lease, now_ns)
            }
            Symlink { parent, name, target, uid, gid } => self.symlink(client, parent, &name, target, uid, gid, now_ns),
            Link { inode, parent, name } => self.link(inode, parent, &name, now_ns),
            Unlink { parent, name } => self.unlink(parent, &name, now_ns),
            Rmdir { parent, name } => self.rmdir(parent, &name, now_ns),
            Rename { parent, name, new_parent, new_name, mode } => {
                self.rename((parent, &name), (new_parent, &new_name), mode, now_ns)
            }
            SetXattr { inode, name, value, exists } => self.set_xattr(inode, &name, value, exists, now_ns),
            RemoveXattr { inode, name } => self.remove_xattr(inode, &name, now_ns),
            OpenHandle { inode } => self.open_handle(client, inode),
            CloseHandle { inode } => self.close_handle(client, inode),
            AttributesSet { inode, pairs } => self.attributes_set(inode, &pairs, now_ns),
            VolumeCreate { name, size, options } => self.volume_create(name, size, &options, now_ns),
            VolumeResize { volume, size, shrink } => self.volume_resize(client, volume, size, shrink, now_ns),
            VolumeDelete { volume } => self.volume_delete(volume),
            VolumeRename { volume, name } => self.volume_rename(volume, name, now_ns),
            LeaseAcquire { volume, mode } => self.lease_acquire(client, volume, mode),
            LeaseRelease { leases } => self.lease_release(client, &leases),
            ChunkAllocate { volume, epoch, indexes } => self.chunk_allocate(client, volume, epoch, &indexes),
            ReplicaFailed { volume, epoch, cs, chunks } => self.replica_failed(client, volume, epoch, cs, &chunks),
            ReplicaFull { volume, epoch, cs, chunk } => self.replica_full(client, volume, epoch, cs, chunk),
            ChunkDrop { volume, epoch, index, count } => self.chunk_drop(client, volume, epoch, index, count),
            CsRegister(server) => self.cs_register(server, None),
            CsJoin { server, lineage } => self.cs_register(server, Some(lineage)),
            CsAbandon { cs } => self.cs_abandon(cs),
            CsReplace { cs, store } => self.cs_replace(cs, store),
            CsMark { cs, boot, durable } => self.cs_mark(cs, boot, durable),
            CsBusy { cs, busy } => self.cs_busy(cs, busy),
            LevelRaise { level } => self.level_raise(level),
            CsHeartbeat { cs, boot, stats, done, damaged, failed } => {
                let beat = crate::servers::Heartbeat { boot, stats, done, damaged, failed };
                self.cs_heartbeat(cs, beat)
            }
            CsReport { cs, after, chunks, last } => self.cs_report(cs, after, &chunks, last),
            CsRemove { cs, force, cancel } => self.cs_remove(cs, force, cancel),
            ConfigSet { pairs } => self.config_set(&pairs),
            MdsAdd { addr, repository, nonce } => self.mds_add(addr, repository, nonce),
            MdsRemove { mds } => self.mds_remove(mds),
            KvPut { key, value, expected } => self.user_put(&key, value, expected),
            KvDelete { key, expected } => self.user_delete(&key, expected),
            request => Err(MdsError::Invalid(format!("not a changing call: {request:?}"))),
        }
    }

    /// Answers a call that changes nothing, from the state as it is: the shell has made sure that it is new enough.
    ///
    /// # Errors
    /// [`MdsError`] as the call says; [`MdsError::Invalid`] for calls that change something and for
    /// [`MdsRequest::MdsStatus`], which only the shell can answer.
    pub fn query(&self, request: &MdsRequest) -> Answer {
        use MdsRequest::*;
        if self.globals.identity.is_none() {
            return Err(MdsError::Unavailable("the cluster is not initialised".into()));
        }
        match request {
            Resolve { path } => self.resolve(path),
            Lookup { parent, name } => self.lookup(*parent, name),
            CsExamine { cs, volume, index } => self.cs_examine(*cs, *volume, *index),
            GetAttr { inode } => Ok(MdsReply::Attr(self.inode(*inode)?.attr(*inode))),
            Readlink { inode } => self.readlink(*inode),
            ReadDir { inode, cookie, limit, attributes } => self.read_dir(*inode, *cookie, *limit, *attributes),
            Parent { inode } => self.parent(*inode),
            GetXattr { inode, name } => self.get_xattr(*inode, name),
            ListXattr { inode } => self.list_xattr(*inode),
            StatFs => Ok(self.stat_fs()),
            AttributesGet { inode } => self.attributes_get(*inode),
            VolumeGet { name } => self.volume_get(name),
            VolumeList { after, limit } => Ok(self.volume_list(after, *limit)),
            ChunkMap { volume, index, limit } => self.chunk_map(*volume, *index, *limit),
            Topology => Ok(self.topology()),
            Stat => Ok(self.stat()),
            Events { after, limit } => Ok(self.events(*after, *limit)),
            ConfigList => Ok(MdsReply::Pairs(config::list(&self.globals.config))),
            KvGet { key } => Ok(self.user_get(key)),
            KvList { prefix, after, limit } => Ok(self.user_list(prefix, after, *limit)),
            other => Err(MdsError::Invalid(format!("not a query: {other:?}"))),
        }
    }

    /// Log index of the last command applied.
    pub fn applied_index(&self) -> u64 {
        self.globals.applied
    }

    /// Digest of every change since the cluster began, in order: equal on all servers at equal index (I11). It costs a
    /// checksum per change and nothing on demand; [`Meta::full_hash`] looks at the state itself.
    pub fn state_hash(&self) -> u64 {
        self.globals.digest
    }

    /// Hash over every record, residents as they are now. Reads everything.
    pub fn full_hash(&self) -> u64 {
        let level = self.level();
        let servers = self.servers.iter().map(|(cs, server)| [encode_plain(cs), server.encode(level)].concat());
        let sessions = self.sessions.iter().map(|(client, session)| encode_plain(&(client, session)));
        let residents =
            servers.chain(sessions).fold(crc64(&encode_plain(&self.globals)), |hash, record| mix(hash, crc64(&record)));
        let is_resident = |key: &[u8]| matches!(key.first(), Some(&(keys::GLOBALS | keys::SERVER | keys::SESSION)));
        let (mut hash, mut from) = (residents, vec![0]);
        loop {
            let page = self.kv.scan(&from, &[u8::MAX], 4096);
            let Some((last, _)) = page.last() else { return hash };
            from = last.clone();
            from.push(0);
            for (key, value) in page.iter().filter(|(key, _)| !is_resident(key)) {
                hash = mix(mix(hash, crc64(key)), crc64(value));
            }
        }
    }

    /// Writes the resident records (counters, sessions, chunk servers) to the store, which is the whole state at
    /// [`Meta::applied_index`] afterwards. To be called before the store is frozen or copied.
    pub fn checkpoint(&mut self) {
        let globals = self.encode_record(&self.globals.clone());
        self.kv.put(&[keys::GLOBALS], globals);
        let level = self.level();
        let servers: Vec<_> = self.servers.iter().map(|(cs, server)| (*cs, server.encode(level))).collect();
        for (cs, value) in servers {
            self.kv.put(&keys::server(keys::SERVER, cs), value);
        }
        for (client, session) in &mut self.sessions {
            if std::mem::take(&mut session.dirty) {
                self.kv.put(&keys::one(keys::SESSION, client.0), encode_plain(session));
            }
        }
    }

    /// A page of the state for an image: pairs after `after`, ascending, all tables. Valid from [`Meta::checkpoint`]
    /// until the next [`Meta::apply`]; to stream while commands go on, read a snapshot of the base instead.
    pub fn image_page(&self, after: Option<&[u8]>, limit: usize) -> Pairs {
        let from = after.map_or(vec![0], |key| [key, &[0]].concat());
        self.kv.scan(&from, &[u8::MAX], limit)
    }

    /// The store.
    pub fn kv(&self) -> &K {
        &self.kv
    }

    /// The store, for its upkeep (flush, base). Keys are not to be changed.
    pub fn kv_mut(&mut self) -> &mut K {
        &mut self.kv
    }

    /// Gives the store back.
    pub fn into_kv(mut self) -> K {
        self.checkpoint();
        self.kv
    }

    // Below: what the other modules build on.

    pub(crate) fn put(&mut self, key: &[u8], value: Vec<u8>) {
        self.writes += 1;
        self.globals.digest = mix(mix(self.globals.digest, crc64(key)), crc64(&value));
        self.kv.put(key, value);
    }

    pub(crate) fn put_record<T: Serialize>(&mut self, key: &[u8], record: &T) {
        let value = self.encode_record(record);
        self.put(key, value);
    }

    pub(crate) fn delete(&mut self, key: &[u8]) {
        self.writes += 1;
        self.globals.digest = mix(self.globals.digest, crc64(key));
        self.kv.delete(key);
    }

    /// Folds something into the digest that is kept in resident records.
    pub(crate) fn digest(&mut self, bytes: &[u8]) {
        self.globals.digest = mix(self.globals.digest, crc64(bytes));
    }

    /// Notes that a resident record changed.
    pub(crate) fn changed(&mut self) {
        self.writes += 1;
    }

    pub(crate) fn record<T: DeserializeOwned>(&self, key: &[u8]) -> Option<T> {
        self.kv.view(key, |bytes| bytes.map(decode_record))
    }

    pub(crate) fn encode_record<T: Serialize>(&mut self, record: &T) -> Vec<u8> {
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.clear();
        let scratch = postcard::to_extend(record, scratch).expect("every record can be encoded");
        let exact = scratch.as_slice().to_vec();
        self.scratch = scratch;
        exact
    }

    /// An inode that somebody can still reach: by a name, a handle or a lease. Others are being freed.
    pub(crate) fn inode(&self, inode: InodeId) -> Result<Inode, MdsError> {
        let record: Option<Inode> = self.record(&keys::inode(inode));
        record.filter(|inode| !inode.is_gone()).ok_or(posix(errno::ENOENT))
    }

    pub(crate) fn put_inode(&mut self, inode: InodeId, record: &Inode) {
        self.put_record(&keys::inode(inode), record);
    }

    pub(crate) fn effect(&mut self, effect: MetaEffect) {
        self.effects.push(effect);
    }

    pub(crate) fn push(&mut self, to: Recipient, push: Push) {
        self.effects.push(MetaEffect::Push { to, push });
    }

    /// Tells the holders of a lease, all but `except`, that map entries changed.
    pub(crate) fn push_map_changed(&mut self, volume: VolumeId, inode: &Inode, except: Option<ClientId>) {
        for holder in inode.lease.holders().filter(|holder| Some(*holder) != except) {
            self.map_pushes.insert((holder, volume));
        }
    }

    /// Tells a chunk server that it has orders.
    pub(crate) fn push_orders(&mut self, cs: CsId) {
        self.order_pushes.insert(cs);
    }

    /// The topology changed: everyone may want to know.
    pub(crate) fn topology_changed(&mut self) {
        self.slots = None;
        self.globals.topology_revision += 1;
        let effect = MetaEffect::Push { to: Recipient::Everyone, push: Push::TopologyChanged };
        if !self.effects.contains(&effect) {
            self.effects.push(effect);
        }
    }

    /// Adds an event. Events may come with a refusal, so they do not count as a change.
    pub(crate) fn event(&mut self, severity: Severity, code: &str, text: String) {
        let writes = self.writes;
        self.log_event(severity, code, text);
        self.writes = writes;
    }
}

impl<B: BaseKv> Meta<Overlay<B>> {
    /// Reads the state anew from its base, which was replaced by another image; the memtables are dropped.
    pub fn reload(&mut self) {
        self.kv.discard();
        self.load();
    }

    /// Checkpoints and freezes the memtable: what is returned, written to the base, makes it the whole state at the
    /// returned log index. When it is durable, call [`Overlay::flushed`] through [`Meta::kv_mut`].
    pub fn freeze(&mut self) -> (u64, Arc<Memtable>) {
        self.checkpoint();
        (self.globals.applied, self.kv.freeze())
    }
}

/// Decodes a record this state machine wrote.
pub(crate) fn decode_record<T: DeserializeOwned>(bytes: &[u8]) -> T {
    postcard::from_bytes(bytes).expect("a record of the metadata state is damaged")
}

fn encode_plain<T: Serialize>(record: &T) -> Vec<u8> {
    postcard::to_stdvec(record).expect("every record can be encoded")
}

fn mix(hash: u64, word: u64) -> u64 {
    (hash.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
