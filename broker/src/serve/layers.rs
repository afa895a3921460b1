//! Layers: a run's own policy, beside the one that is in force for all. It narrows what the run's tree may do, and
//! never widens it: a call is permitted if every policy that its process is under permits it.
//!
//! Who is under a layer is what the kernel says. A run puts a mark under itself that its tree inherits and cannot
//! take off, a seccomp filter; the backstop tells the marks of a process. Without the backstop every judged call
//! is held, and the guard's listener tells which tree it comes from. Of whom neither is known yet, all layers are
//! asked (ADR 10).

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    rc::Rc,
};

use portcullis_policy::Policy;
use portcullis_types::RuleId;

use super::{Broker, reload};
use crate::{
    Mode,
    audit::More,
    control::LayerRow,
    escape::sentence,
    guard::{
        link::{Handed, Narrowing},
        target,
    },
    process::{Context, ProcessKey, Under},
    sys::proc::ProcDir,
};

/// Most layers at once. Runs with the same policy and mode share one.
const MOST: u8 = 63;
/// Where a rule's number says which policy it is of.
const PLACE: u32 = 24;

/// A rule of one of the policies, as numbers of rules go around here: the one for all is 0.
pub(super) const fn rule_of(layer: u8, rule: RuleId) -> RuleId {
    RuleId(rule.0 | (layer as u32) << PLACE)
}

/// The layer whose policy a rule is of.
pub(super) fn layer_of(rule: RuleId) -> u8 {
    u8::try_from(rule.0 >> PLACE).unwrap_or(0)
}

/// The rule's number in the policy of this layer, if it is of that one.
pub(super) fn rule_in(layer: u8, rule: RuleId) -> Option<RuleId> {
    (layer_of(rule) == layer).then_some(RuleId(rule.0 & ((1 << PLACE) - 1)))
}

/// Why a process is refused everything that is marked by a run of an earlier supervisor.
const LOST: &str =
    "its run has a policy of its own, which went with the service that it was given to: start it again";

/// One policy that narrows.
struct Layer {
    path: PathBuf,
    mode: Mode,
    /// Nothing is permitted without.
    policy: Option<Rc<Policy>>,
    diagnostic: Option<String>,
}

/// A run under a layer.
struct Run {
    layer: u8,
    /// What its tree is known by; 0 until it is there, and where the kernel does not tell.
    mark: u64,
    /// What stands for the marks that it was under before; 0 where the kernel does not tell.
    before: u64,
    process: OwnedFd,
}

/// All of them.
#[derive(Default)]
pub(super) struct Layers {
    all: BTreeMap<u8, Layer>,
    /// By the supervisor's tag.
    runs: HashMap<u64, Run>,
    /// Processes whose calls the guard has held, and the tag of their tree's run if that has a layer.
    seen: HashMap<ProcessKey, Option<u64>>,
    last: u8,
}

/// One policy that a process is under, and whether what it refuses is refused.
#[derive(Clone)]
pub(super) struct Ruling {
    pub(super) layer: u8,
    pub(super) mode: Mode,
    pub(super) policy: Rc<Policy>,
}

impl Layers {
    /// A number that has not been used for the longest time: records may still come that name the rule of an earlier one.
    fn free(&mut self) -> Option<u8> {
        let next = (1..=MOST).map(|n| (self.last + n - 1) % MOST + 1).find(|n| !self.all.contains_key(n))?;
        self.last = next;
        Some(next)
    }

    /// Forgets what no run is under any more.
    fn tidy(&mut self) {
        let runs = &self.runs;
        self.all.retain(|layer, _| runs.values().any(|run| run.layer == *layer));
        if self.all.is_empty() {
            self.seen.clear();
        }
    }

    /// Those of the runs that a process is in.
    fn of<'a>(&self, runs: impl Iterator<Item = &'a Run>) -> Vec<u8> {
        let mut found: Vec<u8> = runs.map(|run| run.layer).collect();
        found.sort_unstable();
        found.dedup();
        found
    }
}

impl Broker {
    /// The policies that a process is under, the one for all first.
    ///
    /// # Errors
    /// Why nothing is permitted: one of them cannot be used.
    pub(super) fn rulings(&self, context: &Context) -> Result<Vec<Ruling>, String> {
        let force = self.in_force.as_ref().ok_or_else(|| no_policy(&self.policy_path))?;
        if context.under == Under::Lost {
            return Err(LOST.to_owned());
        }
        let base = Ruling { layer: 0, mode: self.mode, policy: Rc::clone(&force.policy) };
        let mut all = vec![base];
        for (number, layer) in self.layers_of(context) {
            let policy = layer.policy.clone().ok_or_else(|| no_policy(&layer.path))?;
            all.push(Ruling { layer: number, mode: layer.mode, policy });
        }
        Ok(all)
    }

    fn layers_of<'a>(&'a self, context: &'a Context) -> impl Iterator<Item = (u8, &'a Layer)> {
        let concerns = |number: &u8| match &context.under {
            Under::Layers(some) => some.contains(number),
            Under::Unknown | Under::Lost => true,
        };
        self.layers.all.iter().map(|(number, layer)| (*number, layer)).filter(move |(n, _)| concerns(n))
    }

    /// Whether anything that a process's policies refuse is refused, and not only on record.
    pub(super) fn mode_for(&self, context: &Context) -> Mode {
        let enforced = self.layers_of(context).any(|(_, layer)| layer.mode == Mode::Enforce);
        if enforced { Mode::Enforce } else { self.mode }
    }

    /// All policies that are in force for somebody.
    pub(super) fn policies(&self) -> impl Iterator<Item = &Policy> {
        let layers = self.layers.all.values().filter_map(|layer| layer.policy.as_deref());
        self.in_force.iter().map(|force| &*force.policy).chain(layers)
    }

    /// The policy that a rule is of, and the rule's number there.
    pub(super) fn policy_of(&self, rule: RuleId) -> Option<(&Policy, RuleId)> {
        let number = layer_of(rule);
        let policy = match number {
            0 => &*self.in_force.as_ref()?.policy,
            layer => self.layers.all.get(&layer)?.policy.as_deref()?,
        };
        Some((policy, rule_in(number, rule)?))
    }

    /// The file of a layer, as records show it; none for the policy that is in force for all.
    pub(super) fn layer_file(&self, layer: u8) -> Option<String> {
        self.layers.all.get(&layer).map(|layer| sentence(&layer.path.to_string_lossy()))
    }

    /// Files of layers, for the watch.
    pub(super) fn layer_files(&self) -> Vec<PathBuf> {
        self.layers.all.values().map(|layer| layer.path.clone()).collect()
    }

    /// What a process is under, as the kernel says now.
    pub(super) fn under(&mut self, key: ProcessKey) -> Under {
        let marks = self.marks_of(key.pid);
        let seen = self.layers.seen.get(&key);
        // A listener tells of a run within that run's tree nothing: marks do, where there are any.
        if marks.is_none() && (seen.is_none() || self.kernel.is_some()) {
            return if self.layers.all.is_empty() { Under::default() } else { Under::Unknown };
        }
        let marks = marks.unwrap_or_default();
        let known = |mark: &u64| self.layers.runs.values().any(|run| run.mark == *mark);
        if !marks.iter().all(known) {
            return Under::Lost;
        }
        let tree = seen.copied().flatten();
        let is_in = |tag: &u64, run: &Run| Some(*tag) == tree || (run.mark != 0 && marks.contains(&run.mark));
        Under::Layers(self.layers.of(self.layers.runs.iter().filter(|(t, r)| is_in(t, r)).map(|(_, r)| r)))
    }

    /// Whether it is still to be seen which layers a process is under: the guard will, when it holds a call.
    pub(super) fn is_unseen(&self, key: ProcessKey) -> bool {
        self.processes.get(&key).is_some_and(|p| p.context.under == Under::Unknown)
    }

    /// The guard has held a call of a process: it is in that tree.
    pub(super) fn see_tree(&mut self, key: ProcessKey, tag: Option<u64>) {
        if self.layers.all.is_empty() || self.layers.seen.get(&key) == Some(&tag) {
            return;
        }
        self.layers.seen.insert(key, tag);
        self.refresh(key, true);
    }

    /// A process has ended.
    pub(super) fn forget_seen(&mut self, key: ProcessKey) {
        self.layers.seen.remove(&key);
    }

    /// A run is about to come under a layer, or was before this broker was there. The supervisor hears that it is
    /// known.
    pub(super) fn expect_run(&mut self, narrowing: &Narrowing, process: OwnedFd) {
        let tag = narrowing.tag;
        // What has ended may have had the number of a mark that is made now.
        self.forget_unmarked();
        let Some(layer) = self.layer_for(narrowing) else {
            return self.tell_supervisor(Handed::Unlayered(tag));
        };
        // It may have its mark by now, if a broker before was asked first.
        let before = match narrowing.before {
            0 => self.pid_of(&process).and_then(|pid| self.marks_of(pid)).map_or(0, |marks| sum_of(&marks)),
            before => before,
        };
        let mark = narrowing.mark;
        self.layers.runs.insert(tag, Run { layer, mark, before, process });
        self.tell_supervisor(Handed::Layered { tag, mark, before });
    }

    /// A run has put its mark under itself: from here on its tree is narrowed, and its program may begin.
    pub(super) fn mark_run(&mut self, tag: u64) {
        let Some(run) = self.layers.runs.get(&tag) else {
            return self.tell_supervisor(Handed::Unlayered(tag));
        };
        let (pid, before) = (self.pid_of(&run.process), run.before);
        let now = pid.and_then(|pid| self.marks_of(pid));
        let mark = match now.as_deref().map(<[u64]>::split_first) {
            // One more than before, and on top of them: not somebody else's.
            Some(Some((mark, rest))) if sum_of(rest) == before => *mark,
            None if self.kernel.is_none() => 0,
            _ => return self.end_run(tag),
        };
        let earlier =
            |(other, run): (&u64, &Run)| (*other != tag && mark != 0 && run.mark == mark).then_some(*other);
        let earlier: Vec<u64> = self.layers.runs.iter().filter_map(earlier).collect();
        earlier.into_iter().for_each(|other| self.end_run(other));
        if let Some(run) = self.layers.runs.get_mut(&tag) {
            run.mark = mark;
        }
        if let Some(pid) = pid
            && let Ok(birth) = ProcDir::open(pid).and_then(|at| at.birth())
        {
            let key = ProcessKey { pid, start: birth.start };
            if mark == 0 {
                self.layers.seen.insert(key, Some(tag));
            }
            if self.processes.contains_key(&key) {
                self.refresh(key, true);
            }
        }
        self.tell_supervisor(Handed::Layered { tag, mark, before });
    }

    fn pid_of(&self, process: &OwnedFd) -> Option<i32> {
        target::behind_pidfd(std::process::id().cast_signed(), process.as_raw_fd())
    }

    /// The marks of a process. `None`: the kernel does not tell.
    fn marks_of(&mut self, pid: i32) -> Option<Vec<u64>> {
        let marks = self.kernel.as_mut()?.marks(pid)?;
        // A first thread that ends is under nothing any more, while others may go on.
        let is_lost = || ProcDir::open(pid).ok().and_then(|at| at.has_lost_its_first_thread());
        (!marks.is_empty() || is_lost() == Some(false)).then_some(marks)
    }

    /// The layer of a run, loaded if it is the first one's.
    fn layer_for(&mut self, narrowing: &Narrowing) -> Option<u8> {
        let same = |layer: &Layer| layer.path == narrowing.policy && layer.mode == narrowing.mode;
        if let Some((number, _)) = self.layers.all.iter().find(|(_, layer)| same(layer)) {
            return Some(*number);
        }
        let number = self.layers.free()?;
        let (path, mode) = (narrowing.policy.clone(), narrowing.mode);
        self.layers.all.insert(number, Layer { path, mode, policy: None, diagnostic: None });
        self.load_layer(number);
        self.watch_policies();
        self.note_expiry();
        Some(number)
    }

    /// Loads the policy of a layer. A broken one leaves the one before in force. `true`: it was taken.
    fn load_layer(&mut self, number: u8) -> bool {
        let Some(layer) = self.layers.all.get(&number) else { return false };
        let (path, narrowed) = (layer.path.clone(), layer.policy.is_some());
        let shown = sentence(&path.to_string_lossy());
        let (policy, diagnostic) = match reload::load(&path) {
            Ok(loaded) => (Some(Rc::new(loaded.policy)), None),
            Err(text) => (None, Some(text)),
        };
        let taken = policy.is_some();
        let what = match (taken, narrowed) {
            (true, _) => "the policy of a run is in force for its tree",
            (false, true) => "the policy of a run cannot be used; the one before stays in force for its tree",
            (false, false) => "the policy of a run cannot be used; everything is refused to its tree",
        };
        let mut more = vec![("policy", More::Text(&shown))];
        more.extend(diagnostic.as_deref().map(|text| ("diagnostic", More::Text(text))));
        self.note("policy", what, &more);
        if let Some(layer) = self.layers.all.get_mut(&number) {
            layer.policy = policy.or(layer.policy.take());
            layer.diagnostic = diagnostic;
        }
        taken
    }

    /// Loads the policies of all layers again. `true`: some have changed.
    pub(super) fn load_layers(&mut self) -> bool {
        let numbers: Vec<u8> = self.layers.all.keys().copied().collect();
        numbers.into_iter().filter(|number| self.load_layer(*number)).count() > 0
    }

    /// The last process of a run's tree has ended.
    pub(super) fn forget_run(&mut self, tag: u64) {
        self.layers.runs.remove(&tag);
        self.layers.tidy();
    }

    fn end_run(&mut self, tag: u64) {
        self.forget_run(tag);
        self.tell_supervisor(Handed::Unlayered(tag));
    }

    /// Forgets runs whose marks nobody is under any more: one within another run's tree ends unnoticed otherwise.
    fn forget_unmarked(&mut self) {
        if self.kernel.is_none() || self.layers.runs.values().all(|run| run.mark == 0) {
            return;
        }
        let mut there: HashSet<u64> = HashSet::new();
        for pid in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = pid.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            match self.marks_of(pid) {
                Some(marks) => there.extend(marks),
                None if ProcDir::open(pid).is_ok() => return, // it may be under any
                None => {}
            }
        }
        let is_over = |run: &Run| run.mark != 0 && !there.contains(&run.mark);
        let over: Vec<u64> =
            self.layers.runs.iter().filter(|(_, run)| is_over(run)).map(|(tag, _)| *tag).collect();
        over.into_iter().for_each(|tag| self.end_run(tag));
    }

    fn tell_supervisor(&mut self, handed: Handed) {
        if let Some(to) = &mut self.handed {
            to.send(handed);
        }
    }

    /// As `ps` and `status` show the layers that a process is under.
    pub(super) fn layer_names(&self, context: &Context) -> Vec<String> {
        self.layers_of(context).map(|(_, layer)| sentence(&layer.path.to_string_lossy())).collect()
    }

    /// As `status` shows all layers.
    pub(super) fn layer_rows(&self) -> Vec<LayerRow> {
        let row = |(number, layer): (&u8, &Layer)| LayerRow {
            policy: sentence(&layer.path.to_string_lossy()),
            mode: layer.mode,
            runs: self.layers.runs.values().filter(|run| run.layer == *number).count(),
            in_force: layer.policy.is_some(),
            diagnostic: layer.diagnostic.clone(),
        };
        self.layers.all.iter().map(row).collect()
    }
}

/// One number, not 0, for some marks in their order. They are the kernel's addresses, which nobody chooses.
fn sum_of(marks: &[u64]) -> u64 {
    let mut sum = DefaultHasher::new();
    marks.hash(&mut sum);
    sum.finish() | 1
}

/// Why there is no policy to decide by.
fn no_policy(path: &Path) -> String {
    let path = sentence(&path.to_string_lossy());
    format!("no policy is in force: `{path}` cannot be used (see `portcullis status`)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_not_used_again_while_another_is_free() {
        let mut layers = Layers::default();
        let layer = || Layer { path: PathBuf::new(), mode: Mode::Enforce, policy: None, diagnostic: None };
        let run =
            |layer| Run { layer, mark: 0, before: 0, process: fs::File::open("/dev/null").unwrap().into() };
        for expected in 1..=MOST {
            let number = layers.free().unwrap();
            assert_eq!(number, expected);
            layers.all.insert(number, layer());
            layers.runs.insert(u64::from(number), run(number));
        }
        assert_eq!(layers.free(), None);
        layers.runs.remove(&5);
        layers.runs.remove(&9);
        layers.tidy();
        assert_eq!((layers.free(), layers.free()), (Some(5), Some(9)));
    }

    #[test]
    fn a_rule_tells_its_policy() {
        assert_eq!(rule_of(0, RuleId(7)), RuleId(7));
        assert_eq!(rule_of(3, RuleId(7)).0 >> PLACE, 3);
        assert!(rule_of(MOST, RuleId((1 << PLACE) - 1)).0 < u32::MAX);
    }
}
