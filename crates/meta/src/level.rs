//! The level of the cluster: what may be logged and written, and who can read it. See `docs/design/upgrades.md`.
//!
//! I15: nothing of a level above the cluster's is ever in the log or in the image, but for the command that raises it.

use crate::command::Answer;
use crate::kv::Kv;
use crate::record::{Globals, Server};
use crate::state::Meta;
use cairn_types::{CsId, Level};
use cairn_wire::mds::{MdsError, MdsReply, Severity};

impl Globals {
    /// The level of the cluster: it stands first in the record, whatever the rest looks like.
    pub(crate) fn level_in(bytes: &[u8]) -> Level {
        let (version, _): (u32, _) = postcard::take_from_bytes(bytes).expect("the metadata state is damaged");
        Level(version)
    }
}

impl Server {
    /// The record in a cluster of this level: fields of later levels stand behind those of earlier ones.
    pub(crate) fn encode(&self, level: Level) -> Vec<u8> {
        let mut bytes = postcard::to_stdvec(self).expect("every record can be encoded");
        if level >= Level::BUSY {
            bytes = postcard::to_extend(&self.busy, bytes).expect("every record can be encoded");
        }
        bytes
    }

    /// Reads what [`Server::encode`] wrote at this level.
    ///
    /// # Panics
    /// When the record is not of this level: taken for another one, its fields would mean something else.
    pub(crate) fn decode(bytes: &[u8], level: Level) -> Self {
        const DAMAGED: &str = "the record of a chunk server is damaged";
        let (mut server, mut rest): (Self, &[u8]) = postcard::take_from_bytes(bytes).expect(DAMAGED);
        if level >= Level::BUSY {
            (server.busy, rest) = postcard::take_from_bytes(rest).expect(DAMAGED);
        }
        assert!(rest.is_empty(), "I15: the record of a chunk server is of a later level than {level}");
        server
    }
}

impl<K: Kv> Meta<K> {
    /// The level of the cluster.
    pub fn level(&self) -> Level {
        Level(self.globals.version)
    }

    /// The level of the state in the store, when it is above what may be read here: then nothing was read.
    pub fn too_new(&self) -> Option<Level> {
        self.too_new
    }

    /// Raises the cluster. That everybody is at the new level the leader has made sure of, as far as it can be known.
    pub(crate) fn level_raise(&mut self, level: Level) -> Answer {
        if level == self.level() {
            return Ok(MdsReply::Done);
        }
        if level != self.level().next() {
            return Err(MdsError::Refused(format!(
                "the cluster is at {}: it is raised by one at a time",
                self.level()
            )));
        }
        self.globals.version = level.0;
        self.changed();
        self.digest(&level.0.to_le_bytes());
        let text = format!("the cluster is at {level} from now on: releases below it are no longer let in");
        self.event(Severity::Info, "MDS-1040", text);
        Ok(MdsReply::Done)
    }

    /// A chunk server says how busy it is.
    pub(crate) fn cs_busy(&mut self, cs: CsId, busy: u16) -> Answer {
        self.known_server(cs)?.busy = busy.min(1000);
        self.slots = None;
        self.changed();
        self.digest(&cairn_wire::encode(&(cs, busy)));
        Ok(MdsReply::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Presence;
    use crate::{Command, MemKv};
    use cairn_types::{ChunkId, ClientId, ClusterId, HostId, MdsId};
    use cairn_wire::mds::{Call, CsStats, Location, MdsInfo, MdsRequest};

    fn server() -> Server {
        let text = |text: &str| text.to_owned();
        Server {
            store: [9; 16],
            addr: "10.0.0.7:7000".parse().unwrap(),
            location: Location {
                host: HostId([3; 16]),
                host_name: text("h"),
                rack: text("r"),
                row: String::new(),
                room: String::new(),
                site: String::new(),
            },
            tier: 1,
            repository: text("/cs"),
            presence: Presence::Active,
            draining: false,
            failed: None,
            dropped: false,
            boot: 5,
            stats: CsStats { capacity: 300, used: 7, ..CsStats::default() },
            rebuilding: 0,
            report_floor: ChunkId(2),
            busy: 300,
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The record of a chunk server in a cluster of level 1.
    const SERVER_1: &str = "0909090909090909090909090909090900\
         0a000007d83603030303030303030303030303030303016801720000000103\
         2f637300000000\
         05ac02070000000000000000\
         02";

    fn call(request: MdsRequest) -> Vec<u8> {
        let call = Call { session: ClientId(0), sequence: 0, acknowledged: 0, wall_ns: 1, request };
        Command::Call { call, wall_ns: 2 }.encode()
    }

    #[test]
    fn golden_records_and_commands_of_both_levels() {
        let (first, second) = (server().encode(Level(1)), server().encode(Level(2)));
        assert_eq!(hex(&first), SERVER_1.replace(' ', ""));
        assert_eq!(hex(&second), format!("{}ac02", hex(&first)), "300 thousandths behind what was there before");
        assert_eq!(Server::decode(&first, Level(1)), Server { busy: 0, ..server() });
        assert_eq!(Server::decode(&second, Level(2)), server());
        // Stamp, call, envelope, request, clock.
        assert_eq!(hex(&Command::Tick { wall_ns: 3 }.encode()), "010803");
        assert_eq!(hex(&call(MdsRequest::Stat)), "0101000000012b02");
        assert_eq!(hex(&call(MdsRequest::CsBusy { cs: CsId(1025), busy: 300 })), "020100000001408108ac0202");
        assert_eq!(hex(&call(MdsRequest::LevelRaise { level: Level(2) })), "0201000000013f0202");
        let globals = postcard::to_stdvec(&Globals { version: 2, ..Globals::default() }).unwrap();
        assert_eq!((globals[0], Globals::level_in(&globals)), (2, Level(2)));
    }

    #[test]
    #[should_panic(expected = "I15")]
    fn a_record_of_the_next_level_is_not_read_as_one_with_a_field_of_zero() {
        Server::decode(&server().encode(Level(2)), Level(1));
    }

    /// A state at level 1 with one chunk server.
    fn state() -> Meta<MemKv> {
        let mut meta = Meta::open(MemKv::new());
        let first =
            MdsInfo { mds: MdsId(1), addr: "10.0.0.1:1".parse().unwrap(), voter: true, repository: String::new() };
        let bootstrap = Command::Bootstrap { cluster: ClusterId([7; 16]), name: "c".into(), first, wall_ns: 1 };
        meta.apply(1, &bootstrap.encode()).reply.unwrap();
        meta.servers.insert(CsId(1025), Server { busy: 0, ..server() });
        meta
    }

    fn raise(meta: &mut Meta<MemKv>) {
        meta.level_raise(Level(2)).unwrap();
    }

    #[test]
    fn a_state_is_of_one_level_and_below_it_nobody_reads_it() {
        let mut meta = state();
        assert_eq!(meta.level(), Level(1));
        let old = Meta::open_at(meta.into_kv(), Level(1));
        assert_eq!((old.level(), old.too_new()), (Level(1), None));
        meta = Meta::open(old.into_kv());
        raise(&mut meta);
        meta.apply(2, &call(MdsRequest::CsBusy { cs: CsId(1025), busy: 5000 })).reply.unwrap();
        let hash = meta.full_hash();
        let kv = meta.into_kv();
        let old = Meta::open_at(kv, Level(1));
        assert_eq!(old.too_new(), Some(Level(2)));
        let new = Meta::open(old.kv);
        assert_eq!((new.level(), new.servers[&CsId(1025)].busy, new.too_new()), (Level(2), 1000, None));
        assert_eq!(new.full_hash(), hash);
    }

    #[test]
    fn a_level_is_raised_by_one_and_never_lowered() {
        let mut meta = state();
        assert!(matches!(meta.level_raise(Level(3)), Err(MdsError::Refused(_))));
        raise(&mut meta);
        raise(&mut meta);
        assert!(matches!(meta.level_raise(Level(1)), Err(MdsError::Refused(_))));
        assert_eq!(meta.level(), Level(2));
    }

    #[test]
    #[should_panic(expected = "I15")]
    fn a_command_above_the_level_of_the_cluster_is_not_applied() {
        let _ = state().apply(2, &call(MdsRequest::CsBusy { cs: CsId(1025), busy: 1 }));
    }

    #[test]
    fn a_command_above_the_level_of_the_server_is_told_from_garbage() {
        use crate::CommandError;
        let busy = call(MdsRequest::CsBusy { cs: CsId(1025), busy: 1 });
        assert_eq!(Command::decode(&busy, Level(1)), Err(CommandError::Level { found: Level(2), reads: Level(1) }));
        assert!(Command::decode(&busy, Level(2)).is_ok());
        assert!(matches!(Command::decode(&[1, 99], Level(2)), Err(CommandError::Malformed(_))));
        assert!(matches!(Command::decode(&[], Level(2)), Err(CommandError::Level { found: Level(0), .. })));
        assert!(matches!(Command::decode(&[0, 8, 3], Level(2)), Err(CommandError::Level { found: Level(0), .. })));
    }
}
