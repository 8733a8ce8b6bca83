//! The namespace against a plain model, and listing under mutation.

use crate::support::{World, posix};
use cairn_meta::Recipient;
use cairn_stdx::Rng;
use cairn_types::{ClientId, InodeId};
use cairn_wire::mds::*;
use std::collections::{BTreeMap, BTreeSet};

const ENOENT: i32 = 2;
const EEXIST: i32 = 17;
const ENOTDIR: i32 = 20;
const EISDIR: i32 = 21;
const EINVAL: i32 = 22;
const ENOTEMPTY: i32 = 39;
const EPERM: i32 = 1;

/// A file system as POSIX describes it, in the plainest way: a node is a directory of names or a file with a link
/// count.
#[derive(Default)]
struct Model {
    nodes: BTreeMap<u64, Option<BTreeMap<String, u64>>>,
    handles: BTreeMap<u64, u32>,
}

impl Model {
    fn directory(&self, inode: u64) -> Result<&BTreeMap<String, u64>, i32> {
        self.nodes.get(&inode).ok_or(ENOENT)?.as_ref().ok_or(ENOTDIR)
    }

    fn entries(&mut self, inode: u64) -> &mut BTreeMap<String, u64> {
        self.nodes.get_mut(&inode).unwrap().as_mut().unwrap()
    }

    fn names(&self, inode: u64) -> usize {
        self.nodes.values().flatten().flat_map(BTreeMap::values).filter(|child| **child == inode).count()
    }

    fn find(&self, parent: u64, name: &str) -> Result<u64, i32> {
        self.directory(parent)?.get(name).copied().ok_or(ENOENT)
    }

    fn is_directory(&self, inode: u64) -> bool {
        self.nodes[&inode].is_some()
    }

    /// True when the directory can be reached from the root.
    fn is_linked(&self, inode: u64) -> bool {
        inode == 1 || self.names(inode) > 0
    }

    fn is_within(&self, inode: u64, ancestor: u64) -> bool {
        inode == ancestor
            || self.nodes.iter().any(|(parent, entries)| {
                entries.as_ref().is_some_and(|entries| entries.values().any(|child| *child == inode))
                    && self.is_within(*parent, ancestor)
            })
    }

    fn drop_unreachable(&mut self, inode: u64) {
        if inode != 1 && self.names(inode) == 0 && self.handles.get(&inode).is_none_or(|count| *count == 0) {
            self.nodes.remove(&inode);
        }
    }

    fn check_parent(&self, parent: u64) -> Result<(), i32> {
        self.directory(parent)?;
        if self.is_linked(parent) { Ok(()) } else { Err(ENOENT) }
    }

    fn create(&mut self, parent: u64, name: &str, inode: Option<u64>, directory: bool) -> Result<(), i32> {
        self.check_parent(parent)?;
        if self.find(parent, name).is_ok() {
            return Err(EEXIST);
        }
        let inode = inode.expect("the state machine refused what the model allows");
        self.nodes.insert(inode, directory.then(BTreeMap::new));
        self.entries(parent).insert(name.into(), inode);
        Ok(())
    }

    fn link(&mut self, inode: u64, parent: u64, name: &str) -> Result<(), i32> {
        let node = self.nodes.get(&inode).ok_or(ENOENT)?;
        self.check_parent(parent)?;
        if node.is_some() {
            return Err(EPERM);
        }
        if self.names(inode) == 0 {
            return Err(ENOENT);
        }
        if self.find(parent, name).is_ok() {
            return Err(EEXIST);
        }
        self.entries(parent).insert(name.into(), inode);
        Ok(())
    }

    fn remove(&mut self, parent: u64, name: &str, directory: bool) -> Result<(), i32> {
        let inode = self.find(parent, name)?;
        match (directory, self.is_directory(inode)) {
            (true, false) => return Err(ENOTDIR),
            (false, true) => return Err(EISDIR),
            (true, true) if !self.directory(inode)?.is_empty() => return Err(ENOTEMPTY),
            _ => {}
        }
        self.entries(parent).remove(name);
        self.drop_unreachable(inode);
        Ok(())
    }

    fn rename(&mut self, from: (u64, &str), to: (u64, &str), mode: RenameMode) -> Result<(), i32> {
        self.directory(from.0)?;
        self.directory(to.0)?;
        let source = self.find(from.0, from.1)?;
        let target = self.find(to.0, to.1).ok();
        if !self.is_linked(to.0) {
            return Err(ENOENT);
        }
        if self.is_directory(source) && self.is_within(to.0, source) {
            return Err(EINVAL);
        }
        let Some(target) = target else {
            if mode == RenameMode::Exchange {
                return Err(ENOENT);
            }
            self.entries(from.0).remove(from.1);
            self.entries(to.0).insert(to.1.into(), source);
            return Ok(());
        };
        if mode == RenameMode::NoReplace {
            return Err(EEXIST);
        }
        if source == target {
            return Ok(());
        }
        if mode == RenameMode::Exchange {
            if self.is_directory(target) && self.is_within(from.0, target) {
                return Err(EINVAL);
            }
            self.entries(from.0).insert(from.1.into(), target);
            self.entries(to.0).insert(to.1.into(), source);
            return Ok(());
        }
        match (self.is_directory(source), self.is_directory(target)) {
            (true, false) => return Err(ENOTDIR),
            (false, true) => return Err(EISDIR),
            (true, true) if !self.directory(target)?.is_empty() => return Err(ENOTEMPTY),
            _ => {}
        }
        self.entries(from.0).remove(from.1);
        self.entries(to.0).insert(to.1.into(), source);
        self.drop_unreachable(target);
        Ok(())
    }
}

fn compare(world: &World, model: &Model) {
    for (inode, entries) in &model.nodes {
        let attr = world.attr(InodeId(*inode)).unwrap_or_else(|| panic!("inode {inode} is missing"));
        let Some(entries) = entries else {
            assert_eq!(attr.nlink as usize, model.names(*inode), "links of {inode}");
            continue;
        };
        let directories = entries.values().filter(|child| model.is_directory(**child)).count();
        let linked = model.is_linked(*inode);
        assert_eq!(attr.nlink as usize, if linked { 2 + directories } else { 0 }, "links of directory {inode}");
        assert_eq!(attr.size as usize, entries.len());
        let listed: BTreeMap<String, u64> = list(world, InodeId(*inode), 3)
            .into_iter()
            .map(|entry| (String::from_utf8(entry.name).unwrap(), entry.inode.0))
            .collect();
        assert_eq!(listed, *entries, "entries of {inode}");
    }
}

fn list(world: &World, inode: InodeId, limit: u32) -> Vec<DirEntry> {
    let (mut all, mut cookie) = (Vec::<DirEntry>::new(), 0);
    loop {
        let request = MdsRequest::ReadDir { inode, cookie, limit, attributes: true };
        let Ok(MdsReply::Entries { entries, end }) = world.meta.query(&request) else { panic!("listing {inode}") };
        all.extend(entries);
        if end {
            return all;
        }
        cookie = all.last().expect("not the end and nothing listed").cookie;
    }
}

fn bytes(name: &str) -> Vec<u8> {
    name.as_bytes().to_vec()
}

#[test]
fn random_operations_agree_with_a_plain_model() {
    for seed in 0..24 {
        let mut rng = Rng::new(seed);
        let mut world = World::new();
        let sessions: [ClientId; 2] = [world.session(), world.session()];
        let mut model = Model::default();
        model.nodes.insert(1, Some(BTreeMap::new()));
        let names = ["a", "b", "c", "d", "e"];
        for step in 0..1_500 {
            let session = sessions[rng.below(2) as usize];
            let known: Vec<u64> = model.nodes.keys().copied().collect();
            let name = *rng.choose(&names).unwrap();
            let other = *rng.choose(&names).unwrap();
            let one = *rng.choose(&known).unwrap();
            let two = *rng.choose(&known).unwrap();
            let parent = InodeId(one);
            let (found, expected) = match rng.below(12) {
                0..=2 => {
                    let directory = rng.chance(1, 2);
                    let kind = if directory { InodeKind::Directory } else { InodeKind::File };
                    let made = world.make(session, parent, name, kind);
                    let inode = made.as_ref().ok().map(|attr| attr.inode.0);
                    (posix(made), model.create(one, name, inode, directory))
                }
                3 => {
                    let request = MdsRequest::Link { inode: parent, parent: InodeId(two), name: bytes(name) };
                    (posix(world.call(session, request)), model.link(one, two, name))
                }
                4 => {
                    let request = MdsRequest::Unlink { parent, name: bytes(name) };
                    (posix(world.call(session, request)), model.remove(one, name, false))
                }
                5 => {
                    let request = MdsRequest::Rmdir { parent, name: bytes(name) };
                    (posix(world.call(session, request)), model.remove(one, name, true))
                }
                6..=9 => {
                    let mode =
                        *rng.choose(&[RenameMode::Replace, RenameMode::NoReplace, RenameMode::Exchange]).unwrap();
                    let request = MdsRequest::Rename {
                        parent,
                        name: bytes(name),
                        new_parent: InodeId(two),
                        new_name: bytes(other),
                        mode,
                    };
                    (posix(world.call(session, request)), model.rename((one, name), (two, other), mode))
                }
                10 => {
                    let found = posix(world.call(session, MdsRequest::OpenHandle { inode: parent }));
                    *model.handles.entry(one).or_default() += 1;
                    (found, Ok(()))
                }
                _ => {
                    // Whichever session has it open closes it.
                    let closed = sessions
                        .iter()
                        .any(|session| world.call(*session, MdsRequest::CloseHandle { inode: parent }).is_ok());
                    let open = model.handles.get(&one).copied().unwrap_or(0);
                    assert_eq!(closed, open > 0, "seed {seed} step {step}");
                    if closed {
                        model.handles.insert(one, open - 1);
                        model.drop_unreachable(one);
                    }
                    (0, Ok(()))
                }
            };
            assert_eq!(found, expected.err().unwrap_or(0), "seed {seed} step {step}");
            if step % 50 == 0 {
                compare(&world, &model);
                world.meta.check();
            }
        }
        compare(&world, &model);
        for session in sessions {
            world.call(session, MdsRequest::SessionClose).unwrap();
        }
        model.handles.clear();
        for inode in model.nodes.keys().copied().collect::<Vec<_>>() {
            model.drop_unreachable(inode);
        }
        compare(&world, &model);
        world.settle();
        world.meta.check();
        let Ok(MdsReply::Stat(stat)) = world.meta.query(&MdsRequest::Stat) else { panic!() };
        assert_eq!(stat.inodes as usize, model.nodes.len());
    }
}

#[test]
fn a_listing_shows_what_stays_exactly_once_whatever_else_happens() {
    for seed in 0..6 {
        let mut rng = Rng::new(seed);
        let mut world = World::new();
        let session = world.session();
        let root = InodeId::ROOT;
        let staying: BTreeSet<String> = (0..500).map(|n| format!("stay{n}")).collect();
        for name in &staying {
            world.make(session, root, name, InodeKind::File).unwrap();
        }
        for n in 0..200 {
            world.make(session, root, &format!("go{n}"), InodeKind::File).unwrap();
        }
        let (mut seen, mut cookie) = (Vec::new(), 0);
        loop {
            let request = MdsRequest::ReadDir { inode: root, cookie, limit: 7, attributes: false };
            let Ok(MdsReply::Entries { entries, end }) = world.meta.query(&request) else { panic!() };
            assert!(entries.windows(2).all(|pair| pair[0].cookie < pair[1].cookie));
            seen.extend(entries.iter().map(|entry| String::from_utf8(entry.name.clone()).unwrap()));
            if end {
                break;
            }
            cookie = entries.last().unwrap().cookie;
            assert!(cookie > 1 << 32 && i64::try_from(cookie).is_ok());
            for _ in 0..3 {
                let name = format!("go{}", rng.below(400));
                if world.call(session, MdsRequest::Unlink { parent: root, name: bytes(&name) }).is_err() {
                    world.make(session, root, &name, InodeKind::File).unwrap();
                }
            }
        }
        let listed: Vec<String> = seen.into_iter().filter(|name| name.starts_with("stay")).collect();
        assert_eq!(listed.len(), staying.len());
        assert_eq!(listed.into_iter().collect::<BTreeSet<_>>(), staying);
    }
}

#[test]
fn paths_follow_links_on_the_way_and_not_at_the_end() {
    let mut world = World::new();
    let session = world.session();
    let a = world.make(session, InodeId::ROOT, "a", InodeKind::Directory).unwrap().inode;
    let b = world.make(session, a, "b", InodeKind::Directory).unwrap().inode;
    let file = world.make(session, b, "f", InodeKind::File).unwrap().inode;
    let link = |world: &mut World, parent, name: &str, target: &str| {
        let request = MdsRequest::Symlink { parent, name: bytes(name), target: bytes(target), uid: 0, gid: 0 };
        world.call(session, request).unwrap()
    };
    link(&mut world, InodeId::ROOT, "up", "a/b");
    link(&mut world, b, "back", "../b");
    link(&mut world, b, "absolute", "/a");
    link(&mut world, a, "loop", "loop");
    let resolve = |path: &str| match world.meta.query(&MdsRequest::Resolve { path: bytes(path) }) {
        Ok(MdsReply::Attr(attr)) => Ok((attr.inode, attr.kind)),
        Err(MdsError::Posix(errno)) => Err(errno),
        other => panic!("{other:?}"),
    };
    assert_eq!(resolve("/"), Ok((InodeId::ROOT, InodeKind::Directory)));
    assert_eq!(resolve("/up/back/absolute/b//f"), Ok((file, InodeKind::File)));
    assert_eq!(resolve("/a/b/../../up/f"), Ok((file, InodeKind::File)));
    assert_eq!(resolve("/up").map(|(_, kind)| kind), Ok(InodeKind::Symlink));
    assert_eq!(resolve("/a/loop/x"), Err(40));
    assert_eq!(resolve("/a/b/f/x"), Err(ENOTDIR));
    assert_eq!(resolve("/nothing"), Err(ENOENT));
}

#[test]
fn attributes_and_extended_attributes_behave() {
    let mut world = World::new();
    let session = world.session();
    let directory = world.make(session, InodeId::ROOT, "d", InodeKind::Directory).unwrap().inode;
    let set = SetAttr { mode: Some(0o2755), gid: Some(9), ..SetAttr::default() };
    world.call(session, MdsRequest::SetAttr { inode: directory, set }).unwrap();
    let inner = world.make(session, directory, "i", InodeKind::Directory).unwrap();
    assert_eq!((inner.gid, inner.mode), (9, 0o2644), "set-group-id directories hand on their group");
    let file = world.make(session, directory, "f", InodeKind::File).unwrap();
    assert_eq!((file.gid, file.uid, file.mode), (9, 1, 0o644));
    let inode = file.inode;
    let grow = |size| SetAttr { grow_to: Some(size), ..SetAttr::default() };
    for (size, expected) in [(100, 100), (50, 100), (200, 200)] {
        world.call(session, MdsRequest::SetAttr { inode, set: grow(size) }).unwrap();
        assert_eq!(world.attr(inode).unwrap().size, expected);
    }
    let xattr = |world: &mut World, exists, value: &[u8]| {
        let request = MdsRequest::SetXattr { inode, name: bytes("user.n"), value: value.to_vec(), exists };
        posix(world.call(session, request))
    };
    assert_eq!(xattr(&mut world, Some(true), b"1"), 61);
    assert_eq!(xattr(&mut world, Some(false), b"1"), 0);
    assert_eq!(xattr(&mut world, Some(false), b"2"), EEXIST);
    assert_eq!(xattr(&mut world, None, b""), 0);
    let get = MdsRequest::GetXattr { inode, name: bytes("user.n") };
    assert_eq!(world.meta.query(&get), Ok(MdsReply::Bytes(Vec::new())));
    assert_eq!(world.meta.query(&MdsRequest::ListXattr { inode }), Ok(MdsReply::Bytes(b"user.n\0".to_vec())));
    world.call(session, MdsRequest::RemoveXattr { inode, name: bytes("user.n") }).unwrap();
    assert_eq!(posix(world.meta.query(&get)), 61);

    // Attributes of ours are handed on at creation and change nothing that exists.
    let pair = |world: &mut World, inode, key: &str, value: &str| {
        world.call(session, MdsRequest::AttributesSet { inode, pairs: vec![(key.into(), value.into())] })
    };
    pair(&mut world, directory, "/failure-domain", "disk").unwrap();
    pair(&mut world, directory, "replicas", "2").unwrap();
    let late = world.make(session, directory, "late", InodeKind::File).unwrap().inode;
    let get = |world: &World, inode| match world.meta.query(&MdsRequest::AttributesGet { inode }).unwrap() {
        MdsReply::Pairs(pairs) => pairs.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(" "),
        other => panic!("{other:?}"),
    };
    assert_eq!(get(&world, late), "chunk-size=67108864 failure-domain=disk replicas=2:1 tier=0");
    assert_eq!(get(&world, inode), "chunk-size=67108864 failure-domain=host replicas=3:2 tier=0");
    assert!(matches!(pair(&mut world, late, "encoding", "3+2"), Err(MdsError::Refused(_))));
    let pairs = [("tier", "1"), ("replicas", "99"), ("failure-domain", "host")];
    let pairs = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec();
    let several = world.call(session, MdsRequest::AttributesSet { inode: late, pairs });
    assert!(matches!(several, Err(MdsError::Invalid(_))));
    assert_eq!(get(&world, late), "chunk-size=67108864 failure-domain=disk replicas=2:1 tier=0", "all or none");
    assert!(matches!(pair(&mut world, late, "colour", "red"), Err(MdsError::Invalid(_))));
    world.meta.check();
}

#[test]
fn a_held_file_without_a_name_is_asked_back_and_then_freed() {
    let mut world = World::new();
    let (holder, other) = (world.session(), world.session());
    let request = MdsRequest::Create {
        parent: InodeId::ROOT,
        name: bytes("f"),
        kind: InodeKind::File,
        mode: 0o600,
        uid: 0,
        gid: 0,
        rdev: 0,
        lease: true,
    };
    let MdsReply::CreatedIn { attr, lease: Some(grant), .. } = world.call(holder, request).unwrap() else { panic!() };
    assert!(grant.clean && grant.servers.is_empty());
    world.call(other, MdsRequest::Unlink { parent: InodeId::ROOT, name: bytes("f") }).unwrap();
    assert_eq!(world.attr(attr.inode).map(|attr| attr.nlink), Some(0));
    let recall = Push::LeaseRecall { volume: grant.volume, wanted: LeaseMode::Exclusive };
    assert_eq!(world.pushes(Recipient::Session(holder)), [recall]);
    let leases = vec![(grant.volume, grant.epoch, true)];
    world.call(holder, MdsRequest::LeaseRelease { leases }).unwrap();
    assert_eq!(world.attr(attr.inode), None);
    world.meta.check();
}
