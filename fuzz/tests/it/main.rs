//! The corpora hold, the engine sees what it is there to see, and the page about it tells the truth.

use cairn_fuzz::engine::{Options, execute, run};
use cairn_fuzz::{Bound, Seeds, Shape, TARGETS, Target, alloc, corpus, table};
use std::path::Path;
use std::time::Duration;

#[global_allocator]
static ALLOCATOR: alloc::Counting = alloc::Counting;

/// I19 on everything that was ever found, and on what the encoders make today.
#[test]
fn every_target_holds_on_its_corpus() {
    for target in TARGETS {
        let mut inputs = corpus::load(target).unwrap();
        assert!(!inputs.is_empty(), "{} has no corpus; run `cargo xtask fuzz --seeds`", target.name);
        inputs.extend((target.seeds)());
        for (name, bytes) in inputs {
            let (finding, _) = execute(target, &bytes);
            assert_eq!(finding, None, "{} on {name}", target.name);
        }
    }
}

#[test]
fn the_corpora_are_small_and_of_targets_that_exist() {
    let mut bytes = 0;
    for folder in std::fs::read_dir(corpus::root()).unwrap() {
        let path = folder.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        assert!(TARGETS.iter().any(|target| target.name == name), "a corpus of no target: {name}");
        bytes += std::fs::read_dir(path).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum::<u64>();
    }
    assert!(bytes < 1 << 20, "the corpora take {bytes} bytes");
}

/// `fuzz/src/targets` holds one file a target, and the page lists what the code lists.
#[test]
fn the_table_of_the_page_is_that_of_the_code() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/design/fuzzing.md");
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.contains(&table()), "replace the table of docs/design/fuzzing.md by `cargo xtask fuzz --table`");
    for file in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/targets")).unwrap() {
        let name = file.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned();
        let known = TARGETS.iter().any(|target| target.name == name);
        assert!(known || ["mod", "control"].contains(&name.as_str()), "{name} is not in the list of targets");
    }
}

fn seeds() -> Seeds {
    vec![("start".to_owned(), vec![1, 8, 0, 1, 2, 3, 4, 5, 6, 7, 8])]
}

fn of(name: &'static str, run: fn(&[u8])) -> Target {
    let (shape, bound) = (Shape::Bytes, Bound::STRICT);
    Target { name, covers: "", entry: "", shape, bound, run, seal: |_| {}, seeds }
}

fn findings(target: &Target) -> String {
    let artifacts = tempfile::tempdir().unwrap();
    // Far more than it takes; the run ends early only by finding too much, so it is kept short.
    let time = Duration::from_millis(1500);
    let options = Options { time, seed: 1, artifacts: artifacts.path().to_owned(), keep: false };
    run(target, &options).unwrap().findings.join("\n")
}

/// A parser without its length check, one that believes a length and one that copies too often.
#[test]
fn the_engine_sees_panics_and_memory_beyond_the_bound() {
    let unchecked = of("unchecked", |bytes| {
        if let [1, len, rest @ ..] = bytes {
            let _ = alloc::measured(bytes.len(), || rest[..usize::from(*len)].to_vec());
        }
    });
    assert!(findings(&unchecked).contains("panic at fuzz/tests/it/main.rs"), "{}", findings(&unchecked));
    let trusting = of("trusting", |bytes| {
        if let [1, low, high, ..] = bytes {
            let promised = usize::from(u16::from_le_bytes([*low, *high])) * 16;
            alloc::measured(bytes.len(), || drop(std::hint::black_box(Vec::<u8>::with_capacity(promised))));
        }
    });
    assert!(findings(&trusting).contains("beyond the bound"), "{}", findings(&trusting));
    let honest = of("honest", |bytes| drop(alloc::measured(bytes.len(), || bytes.to_vec())));
    assert_eq!(findings(&honest), "");
}

/// Mistakes planted in the product: with the feature `planted` only.
#[test]
fn planted_mistakes_of_parsers_are_found() {
    if !cairn_stdx::planted::available() {
        return;
    }
    for (bug, target, word) in [
        ("wire_frame_length_unchecked", "frames", "panic at crates/wire/src/frame.rs"),
        ("wire_room_by_promise", "frames", "beyond the bound"),
    ] {
        let target = TARGETS.iter().find(|known| known.name == target).unwrap();
        assert_eq!(findings(target), "", "{bug} is off");
        cairn_stdx::planted::activate(Some(bug));
        let found = findings(target);
        cairn_stdx::planted::activate(None);
        assert!(found.contains(word), "{bug}: {found}");
    }
}
