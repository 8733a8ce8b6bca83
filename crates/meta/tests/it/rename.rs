//! Every kind of source against every kind of target, in every mode.

use crate::support::{World, posix};
use cairn_types::InodeId;
use cairn_wire::mds::*;

fn build() -> (World, cairn_types::ClientId) {
    let mut world = World::new();
    let session = world.session();
    let root = InodeId::ROOT;
    for file in ["file1", "file2"] {
        world.make(session, root, file, InodeKind::File).unwrap();
    }
    for directory in ["empty1", "empty2", "full1", "full2"] {
        let inode = world.make(session, root, directory, InodeKind::Directory).unwrap().inode;
        if directory.starts_with("full") {
            world.make(session, inode, "inside", InodeKind::Directory).unwrap();
        }
    }
    let first = match world.meta.query(&MdsRequest::Lookup { parent: root, name: b"file1".to_vec() }) {
        Ok(MdsReply::Attr(attr)) => attr.inode,
        other => panic!("{other:?}"),
    };
    world.call(session, MdsRequest::Link { inode: first, parent: root, name: b"alias1".to_vec() }).unwrap();
    (world, session)
}

#[test]
fn the_matrix_of_sources_and_targets() {
    use RenameMode::*;
    let cases = [
        ("file1", "file2", [0, 17, 0]),
        ("file1", "nothing", [0, 0, 2]),
        ("file1", "empty2", [21, 17, 0]),
        ("file1", "full2", [21, 17, 0]),
        ("file1", "file1", [0, 17, 0]),
        ("file1", "alias1", [0, 17, 0]),
        ("empty1", "file2", [20, 17, 0]),
        ("empty1", "nothing", [0, 0, 2]),
        ("empty1", "empty2", [0, 17, 0]),
        ("full1", "empty2", [0, 17, 0]),
        ("empty1", "full2", [39, 17, 0]),
        ("full1", "full2", [39, 17, 0]),
        ("nothing", "file1", [2, 2, 2]),
        ("full1", "full1/inside", [22, 22, 22]),
        ("full1", "full1/new", [22, 22, 22]),
        ("full1/inside", "full1", [39, 17, 22]),
        ("full1/inside", "empty1", [0, 17, 0]),
        ("full1/inside", "nothing", [0, 0, 2]),
    ];
    for (from, to, expected) in cases {
        for (mode, expected) in [Replace, NoReplace, Exchange].into_iter().zip(expected) {
            let (mut world, session) = build();
            let place = |world: &World, path: &str| match path.split_once('/') {
                None => (InodeId::ROOT, path.as_bytes().to_vec()),
                Some((directory, name)) => {
                    let name_bytes = directory.as_bytes().to_vec();
                    match world.meta.query(&MdsRequest::Lookup { parent: InodeId::ROOT, name: name_bytes }) {
                        Ok(MdsReply::Attr(attr)) => (attr.inode, name.as_bytes().to_vec()),
                        other => panic!("{other:?}"),
                    }
                }
            };
            let ((parent, name), (new_parent, new_name)) = (place(&world, from), place(&world, to));
            let inode_at = |world: &World, parent, name: &[u8]| match world
                .meta
                .query(&MdsRequest::Lookup { parent, name: name.to_vec() })
            {
                Ok(MdsReply::Attr(attr)) => Some(attr.inode),
                _ => None,
            };
            let before = (inode_at(&world, parent, &name), inode_at(&world, new_parent, &new_name));
            let request =
                MdsRequest::Rename { parent, name: name.clone(), new_parent, new_name: new_name.clone(), mode };
            assert_eq!(posix(world.call(session, request)), expected, "{from} to {to}, {mode:?}");
            let after = (inode_at(&world, parent, &name), inode_at(&world, new_parent, &new_name));
            let same = before.0 == before.1;
            let wanted = match (expected, mode) {
                (0, _) if same => before,
                (0, Exchange) => (before.1, before.0),
                (0, _) => (None, before.0),
                _ => before,
            };
            assert_eq!(after, wanted, "{from} to {to}, {mode:?}");
            world.meta.check();
        }
    }
}
