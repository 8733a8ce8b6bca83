use super::NameOp::{Create, Lookup, Rename, Unlink};
use super::NameResult::{Done, Exists, Inode, Missing};
use super::*;
use cairn_stdx::Rng;

fn call(op: NameOp, begun: u64, ended: u64, result: NameResult) -> NameCall {
    NameCall { op, begun, ended: Some((ended, result)) }
}

fn judge(calls: &[NameCall]) -> Result<Judgement, String> {
    check(calls, BRANCHES_MAX, SEARCHED_MAX)
}

fn lost(op: NameOp, begun: u64) -> NameCall {
    NameCall { op, begun, ended: None }
}

#[test]
fn what_one_order_explains_is_accepted() {
    // Two creations overlap, one wins; a rename overlaps a lookup that finds the old file under the new name's place.
    let calls = [
        call(Create(0), 0, 9, Inode(7)),
        call(Create(0), 1, 5, Exists),
        call(Rename(0, 1), 10, 20, Done),
        call(Lookup(0), 11, 12, Inode(7)),
        call(Lookup(1), 13, 14, Inode(7)),
        call(Lookup(0), 15, 21, Missing),
    ];
    assert_eq!(judge(&calls), Ok(Judgement::Fits));
    // A creation that was never answered took effect late, and its file is the same wherever it goes.
    let calls = [
        lost(Create(0), 0),
        call(Lookup(0), 5, 6, Missing),
        call(Rename(0, 2), 7, 8, Done),
        call(Lookup(2), 9, 10, Inode(3)),
        call(Lookup(2), 11, 12, Inode(3)),
        call(Unlink(2), 13, 14, Done),
        call(Lookup(0), 15, 16, Missing),
    ];
    assert_eq!(judge(&calls), Ok(Judgement::Fits));
}

#[test]
fn what_no_order_explains_is_refused() {
    let refused = |calls: &[NameCall]| assert!(judge(calls).is_err(), "{calls:?}");
    // A stale lookup.
    refused(&[call(Create(0), 0, 1, Inode(7)), call(Unlink(0), 2, 3, Done), call(Lookup(0), 4, 5, Inode(7))]);
    refused(&[call(Create(0), 0, 1, Inode(7)), call(Lookup(0), 2, 3, Missing)]);
    // Executed twice: the retry of an unlink that had happened.
    refused(&[call(Create(0), 0, 1, Inode(7)), call(Unlink(0), 2, 3, Missing)]);
    // Two creators of one name without a removal between.
    refused(&[call(Create(0), 0, 9, Inode(7)), call(Create(0), 1, 5, Inode(8))]);
    // A rename that left both names.
    refused(&[
        call(Create(0), 0, 1, Inode(7)),
        call(Rename(0, 1), 2, 3, Done),
        call(Lookup(1), 4, 5, Inode(7)),
        call(Lookup(0), 6, 7, Inode(7)),
    ]);
    // The number of a file that was never answered changes.
    refused(&[lost(Create(0), 0), call(Lookup(0), 5, 6, Inode(3)), call(Lookup(0), 7, 8, Inode(4))]);
    // What was never answered cannot have happened before it began, nor twice.
    refused(&[call(Lookup(0), 0, 1, Inode(3)), lost(Create(0), 2)]);
    refused(&[lost(Create(0), 0), call(Unlink(0), 1, 2, Done), call(Unlink(0), 3, 4, Done)]);
}

/// Carries calls out one after another, each at a moment between its beginning and its answer.
/// One of `lost` of them is not answered.
fn random_history(rng: &mut Rng, length: u64, lost: u64) -> Vec<NameCall> {
    let mut state: [Option<u64>; NAMES] = [None; NAMES];
    let mut calls = Vec::new();
    for at in 1..=length {
        let (a, b) = (rng.below(NAMES as u64) as usize, rng.below(NAMES as u64) as usize);
        let op = match rng.below(5) {
            0 | 1 => Create(a),
            2 => Lookup(a),
            3 => Unlink(a),
            _ if a != b => Rename(a, b),
            _ => Lookup(b),
        };
        let result = match op {
            Create(name) if state[name].is_some() => Exists,
            Create(name) => Inode(*state[name].insert(at)),
            Lookup(name) => state[name].map_or(Missing, Inode),
            Unlink(name) => state[name].take().map_or(Missing, |_| Done),
            Rename(from, to) => match state[from].take() {
                None => Missing,
                some => {
                    state[to] = some;
                    Done
                }
            },
        };
        let ended = (!rng.chance(1, lost)).then(|| (at * 10 + rng.below(40), result));
        calls.push(NameCall { op, begun: at * 10 - rng.below(40).min(at * 10), ended });
    }
    calls
}

/// Changes an answer; false when the call drawn has none.
fn falsify(rng: &mut Rng, calls: &mut [NameCall]) -> bool {
    let at = rng.below(calls.len() as u64) as usize;
    let Some((ended, result)) = calls[at].ended else { return false };
    let wrong = match result {
        Inode(_) if matches!(calls[at].op, Lookup(_)) => Missing,
        Inode(_) => Exists,
        Done => Missing,
        Missing if matches!(calls[at].op, Lookup(_)) => Inode(1_000_000),
        Missing => Done,
        Exists | NameResult::Refused => Inode(1_000_001),
    };
    calls[at].ended = Some((ended, wrong));
    true
}

#[test]
fn histories_that_happened_are_accepted_and_most_with_one_false_answer_are_not() {
    let mut refused = 0;
    for seed in 0..300 {
        let mut rng = Rng::new(seed);
        let mut calls = random_history(&mut rng, 40, 12);
        assert_eq!(judge(&calls), Ok(Judgement::Fits), "seed {seed}");
        if !falsify(&mut rng, &mut calls) {
            continue;
        }
        refused += usize::from(judge(&calls).is_err());
    }
    assert!(refused > 150, "{refused} of 300");
}

/// True when some order explains every answer: tries all, with nothing merged and nothing put off.
fn fits_plainly(calls: &[NameCall]) -> bool {
    fn orders(
        search: &Search<'_>,
        (state, done): (State, BTreeSet<CallId>),
        until: &NameCall,
        seen: &mut BTreeSet<(State, BTreeSet<CallId>)>,
    ) {
        if !seen.insert((state, done.clone())) {
            return;
        }
        let now = until.ended.expect("an answer").0;
        for (call, asked) in search.calls.iter().enumerate() {
            if asked.begun <= now
                && !done.contains(&call)
                && let Some(after) = search.call(&state, call)
            {
                let mut done = done.clone();
                done.insert(call);
                orders(search, (after, done), until, seen);
            }
        }
    }
    let made = |call: &NameCall| match (call.op, call.ended) {
        (Create(_), Some((_, Inode(inode)))) => Some(inode),
        _ => None,
    };
    let made = calls.iter().filter_map(made).collect();
    let search = Search { calls, made, open: BTreeSet::new(), lost: BTreeMap::new(), branches_max: 0 };
    let mut answered: Vec<CallId> = (0..calls.len()).filter(|call| calls[*call].ended.is_some()).collect();
    answered.sort_by_key(|call| (calls[*call].ended.map(|(at, _)| at), *call));
    let mut branches = BTreeSet::from([([None; NAMES], BTreeSet::new())]);
    for call in answered {
        let mut seen = BTreeSet::new();
        for branch in branches {
            orders(&search, branch, &calls[call], &mut seen);
        }
        branches = seen.into_iter().filter(|(_, done)| done.contains(&call)).collect();
    }
    !branches.is_empty()
}

#[test]
fn the_search_agrees_with_one_that_merges_nothing() {
    let mut verdicts = [0; 2];
    for seed in 0..4_000 {
        let mut rng = Rng::new(seed);
        let mut calls = random_history(&mut rng, 9, 3);
        // Lies about a call or two: the more are never answered, the more lies they explain.
        for _ in 0..rng.below(3) {
            falsify(&mut rng, &mut calls);
        }
        let fits = fits_plainly(&calls);
        assert_eq!(judge(&calls).is_ok(), fits, "seed {seed}: {calls:?}");
        verdicts[usize::from(fits)] += 1;
    }
    assert!(verdicts[0] > 300 && verdicts[1] > 300, "{verdicts:?}");
}

#[test]
fn many_calls_without_an_answer_are_judged_mostly_and_never_refused() {
    let mut judged = 0;
    for seed in 0..10 {
        let mut rng = Rng::new(seed);
        let mut calls = random_history(&mut rng, 60, 12);
        // Twenty more whose clients were killed before anybody heard of them.
        for _ in 0..20 {
            let (a, b) = (rng.below(NAMES as u64) as usize, rng.below(NAMES as u64) as usize);
            let op = [Create(a), Unlink(a), Rename(a, b)][rng.below(3) as usize];
            calls.push(lost(op, rng.below(600)));
        }
        let judgement = judge(&calls).expect("what happened is not refused");
        judged += u32::from(judgement == Judgement::Fits);
    }
    assert!(judged > 5, "{judged} of 10");
}

#[test]
fn a_search_beyond_its_bounds_judges_nothing() {
    let calls = random_history(&mut Rng::new(1), 40, 3);
    assert_eq!(check(&calls, 3, SEARCHED_MAX), Ok(Judgement::NotJudged));
    assert_eq!(check(&calls, BRANCHES_MAX, 3), Ok(Judgement::NotJudged));
}
