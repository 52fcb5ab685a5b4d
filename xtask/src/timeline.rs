//! What a run was over time: which vCPU ran where, the flags, the real bit, and what was done when.

use std::collections::BTreeMap;

use crate::events::{Body, Event};

/// Time since the first event, from the time-stamp counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    start: u64,
    /// Ticks in a second, if that is known.
    ticks_per_second: Option<u64>,
}

impl Clock {
    /// A clock that starts at this tick and has so many of them in a second.
    pub const fn of(start: u64, ticks_per_second: Option<u64>) -> Self {
        Self { start, ticks_per_second }
    }

    /// The clock of a run. `known`: so many ticks a second, whatever the machine says of itself.
    pub fn of_run(events: &[Event], known: Option<u64>) -> Self {
        let start = events.iter().map(|event| event.tsc).min().unwrap_or(0);
        let said = events.iter().find_map(|event| match event.body {
            Body::Boot { ticks_per_second, .. } => ticks_per_second,
            _ => None,
        });
        Self::of(start, known.or(said).filter(|ticks| *ticks > 0))
    }

    /// How fast it is, where that is known.
    pub const fn ticks_per_second(&self) -> Option<u64> {
        self.ticks_per_second
    }

    /// Nanoseconds from its start to `tsc`; ticks where its speed is not known.
    pub fn nanoseconds(&self, tsc: u64) -> u64 {
        let ticks = tsc.saturating_sub(self.start);
        let Some(speed) = self.ticks_per_second else { return ticks };
        let nanoseconds = u128::from(ticks) * 1_000_000_000 / u128::from(speed);
        u64::try_from(nanoseconds).unwrap_or(u64::MAX)
    }

    /// The time from its start to `tsc`, in [`Self::unit`]s.
    pub fn time(&self, tsc: u64) -> String {
        let time = self.nanoseconds(tsc);
        match self.ticks_per_second {
            Some(_) => format!("{}.{:06}", time / 1_000_000_000, time / 1000 % 1_000_000),
            None => time.to_string(),
        }
    }

    /// What [`Self::time`] is in: seconds, or ticks of the time-stamp counter.
    pub const fn unit(&self) -> &'static str {
        if self.ticks_per_second.is_some() { "s" } else { "ticks" }
    }
}

/// A vCPU on a CPU, with its flag, for as long as nothing of that changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// From when until when (time-stamp counter).
    pub from: u64,
    /// See `from`.
    pub to: u64,
    /// Which CPU.
    pub cpu: u32,
    /// Which of [`Timeline::vcpus`].
    pub vcpu: usize,
    /// The flag: detection is off for it.
    pub disabled: bool,
}

/// Something that happened to a vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// When (time-stamp counter).
    pub at: u64,
    /// Where.
    pub cpu: u32,
    /// `#AC` and its verdict, or a write to 0x33 and its result.
    pub name: String,
    /// What else is known: RIP and the instruction's bytes, or the value.
    pub details: Vec<(&'static str, String)>,
}

/// A vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vcpu {
    /// Its VM.
    pub vm: String,
    /// Its index there.
    pub index: u32,
    /// What happened to it, in order.
    pub marks: Vec<Mark>,
}

impl Vcpu {
    /// As it is called on time lines.
    pub fn name(&self) -> String {
        format!("{}/{}", self.vm, self.index)
    }
}

/// The real bit of a core was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// When (time-stamp counter).
    pub at: u64,
    /// The bit.
    pub on: bool,
    /// Why.
    pub why: String,
}

/// A core: threads that share MSR 0x33.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Core {
    /// Its CPUs.
    pub cpus: Vec<u32>,
    /// Its real bit, in order. Before the first time it is not known.
    pub bit: Vec<Written>,
}

/// A run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timeline {
    /// The first and the last event (time-stamp counter).
    pub start: u64,
    /// See `start`.
    pub end: u64,
    /// The CPUs that took part.
    pub cpus: Vec<u32>,
    /// The cores, by their numbers.
    pub cores: BTreeMap<u32, Core>,
    /// The vCPUs, in the order in which they were first heard of.
    pub vcpus: Vec<Vcpu>,
    /// Who ran where, by time of beginning. None without `schedule_events`.
    pub spans: Vec<Span>,
}

impl Timeline {
    /// Of the events of a run, in their order ([`crate::events::in_order`]).
    pub fn of(events: &[Event]) -> Self {
        let mut builder = Builder::default();
        events.iter().for_each(|event| builder.add(event));
        builder.finish(events)
    }

    /// Whether it is known who ran where.
    pub fn is_scheduled(&self) -> bool {
        !self.spans.is_empty()
    }

    /// Who ran on this CPU, in order, and for how long: times of one vCPU that only differ in its flag
    /// are one.
    pub fn turns(&self, cpu: u32) -> Vec<Span> {
        let mut turns: Vec<Span> = Vec::new();
        for span in self.spans.iter().filter(|span| span.cpu == cpu) {
            match turns.last_mut() {
                Some(last) if last.vcpu == span.vcpu && last.to == span.from => last.to = span.to,
                _ => turns.push(*span),
            }
        }
        turns
    }
}

#[derive(Default)]
struct Builder {
    core_of: BTreeMap<u32, u32>,
    cores: BTreeMap<u32, Core>,
    vcpus: Vec<Vcpu>,
    spans: Vec<Span>,
    /// What runs on each CPU; `to` is not known yet.
    running: BTreeMap<u32, Span>,
}

impl Builder {
    fn add(&mut self, event: &Event) {
        let Event { tsc, cpu, body, .. } = event;
        match body {
            Body::CpuOnline { core, .. } => {
                self.core_of.insert(*cpu, *core);
                self.cores.entry(*core).or_default().cpus.push(*cpu);
            }
            Body::Load { vm, vcpu, disabled } => {
                let vcpu = self.vcpu(vm, *vcpu);
                let span = Span { from: *tsc, to: *tsc, cpu: *cpu, vcpu, disabled: *disabled };
                self.running.insert(*cpu, span);
            }
            Body::Put { disabled, .. } => {
                self.flag(*cpu, *tsc, *disabled);
                self.end(*cpu, *tsc);
            }
            Body::RealBit { vm, on, why, .. } => {
                let written = Written { at: *tsc, on: *on, why: why.clone() };
                // A CPU that never said that it is online is a core of its own.
                let core = self.core_of.get(cpu).copied().unwrap_or(*cpu);
                self.cores.entry(core).or_default().bit.push(written);
                // A step leaves the flag as it is.
                if vm.is_some() && why != "step" {
                    self.flag(*cpu, *tsc, !on);
                }
            }
            // The flag of a vCPU that is traced.
            Body::TraceBit { vm: Some(_), on, .. } => self.flag(*cpu, *tsc, !on),
            Body::Ac(ac) => {
                // Where a sibling wants it on, the flag is all that changes.
                if ac.verdict == "warn" {
                    self.flag(*cpu, *tsc, true);
                }
                let details = vec![
                    ("rip", ac.rip.to_string()),
                    ("cr3", ac.cr3.to_string()),
                    ("bytes", ac.bytes.to_string()),
                ];
                let name = format!("#AC: {}", ac.verdict);
                self.mark(&ac.vm, ac.vcpu, Mark { at: *tsc, cpu: *cpu, name, details });
            }
            Body::TestCtrlWrite { vm, vcpu, value, result } => {
                let name = format!("0x33: {result}");
                let details = vec![("value", value.to_string())];
                self.mark(vm, *vcpu, Mark { at: *tsc, cpu: *cpu, name, details });
            }
            Body::VcpuEnd { vm, vcpu, .. } => {
                self.vcpu(vm, *vcpu);
            }
            _ => {}
        }
    }

    fn vcpu(&mut self, vm: &str, index: u32) -> usize {
        let known = self.vcpus.iter().position(|vcpu| vcpu.vm == vm && vcpu.index == index);
        known.unwrap_or_else(|| {
            self.vcpus.push(Vcpu { vm: vm.to_owned(), index, marks: Vec::new() });
            self.vcpus.len() - 1
        })
    }

    fn mark(&mut self, vm: &str, vcpu: u32, mark: Mark) {
        let index = self.vcpu(vm, vcpu);
        self.vcpus[index].marks.push(mark);
    }

    /// The flag of whoever runs on `cpu`.
    fn flag(&mut self, cpu: u32, tsc: u64, disabled: bool) {
        if let Some(span) = self.running.get_mut(&cpu).filter(|span| span.disabled != disabled) {
            let next = Span { from: tsc, disabled, ..*span };
            self.spans.push(Span { to: tsc, ..*span });
            *span = next;
        }
    }

    fn end(&mut self, cpu: u32, tsc: u64) {
        if let Some(span) = self.running.remove(&cpu) {
            self.spans.push(Span { to: tsc, ..span });
        }
    }

    fn finish(mut self, events: &[Event]) -> Timeline {
        let start = events.iter().map(|event| event.tsc).min().unwrap_or(0);
        let end = events.iter().map(|event| event.tsc).max().unwrap_or(0);
        // Whoever is not put ran until the end, as far as anybody knows.
        let running: Vec<u32> = self.running.keys().copied().collect();
        running.into_iter().for_each(|cpu| self.end(cpu, end));
        self.spans.sort_by_key(|span| span.from);
        let cpus = self.core_of.into_keys().collect();
        let Self { cores, vcpus, spans, .. } = self;
        Timeline { start, end, cpus, cores, vcpus, spans }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::events::parse_lines;

    /// Two CPUs of a core each: vCPU a/0 is warned of on CPU 0, moves to CPU 1, and is still there; b/0
    /// is stepped on CPU 0.
    pub(crate) const RUN: &str = r#"
        {"seq":0,"tsc":100,"cpu":0,"event":"cpu-online","apic_id":0,"core":0}
        {"seq":0,"tsc":110,"cpu":1,"event":"cpu-online","apic_id":1,"core":1}
        {"seq":1,"tsc":120,"cpu":0,"event":"real-bit","on":true,"why":"boot"}
        {"seq":2,"tsc":150,"cpu":0,"event":"boot","version":"0.1.0","cpus":2,"sld":"warn","sld_source":"msr","ticks_per_second":1000000,"firmware":"bios"}
        {"seq":3,"tsc":160,"cpu":0,"event":"vm-start","vm":"a","policy":"warn","exposed":false,"vcpus":1,"memory_bytes":8388608}
        {"seq":4,"tsc":170,"cpu":0,"event":"vm-start","vm":"b<i>","policy":"step","exposed":false,"vcpus":1,"memory_bytes":8388608}
        {"seq":5,"tsc":200,"cpu":0,"event":"load","vm":"a","vcpu":0,"disabled":false}
        {"seq":6,"tsc":250,"cpu":0,"event":"ac","vm":"a","vcpu":0,"rip":"0x10","cr3":"0x1000","cpl":0,"bits":64,"am":false,"ac":false,"virtual_bit":false,"legacy":false,"verdict":"warn","bytes":"f0830001"}
        {"seq":7,"tsc":251,"cpu":0,"event":"real-bit","on":false,"why":"warn","vm":"a","vcpu":0}
        {"seq":8,"tsc":300,"cpu":0,"event":"put","vm":"a","vcpu":0,"disabled":true}
        {"seq":9,"tsc":310,"cpu":0,"event":"real-bit","on":true,"why":"task-switch","vm":"b<i>","vcpu":0}
        {"seq":10,"tsc":320,"cpu":0,"event":"load","vm":"b<i>","vcpu":0,"disabled":false}
        {"seq":11,"tsc":330,"cpu":0,"event":"real-bit","on":false,"why":"step","vm":"b<i>","vcpu":0}
        {"seq":12,"tsc":332,"cpu":0,"event":"real-bit","on":true,"why":"step","vm":"b<i>","vcpu":0}
        {"seq":13,"tsc":333,"cpu":0,"event":"ac","vm":"b<i>","vcpu":0,"rip":"0x20","cr3":"0x1000","cpl":3,"bits":64,"am":false,"ac":false,"virtual_bit":false,"legacy":false,"verdict":"step","bytes":"f0830001"}
        {"seq":14,"tsc":340,"cpu":0,"event":"test-ctrl-write","vm":"b<i>","vcpu":0,"value":"0x20000000","result":"gp"}
        {"seq":1,"tsc":350,"cpu":1,"event":"load","vm":"a","vcpu":0,"disabled":true}
        {"seq":15,"tsc":400,"cpu":0,"event":"put","vm":"b<i>","vcpu":0,"disabled":false}
        {"seq":16,"tsc":450,"cpu":0,"event":"offender","vm":"b<i>","vcpu":0,"rip":"0x20","cr3":"0x1000","cpl":3,"bits":64,"count":1,"missed":0,"verdicts":{"step":1},"first":333,"last":333,"bytes":"f0830001"}
        {"seq":17,"tsc":460,"cpu":0,"event":"vcpu-end","vm":"b<i>","vcpu":0,"counters":{}}
        {"seq":18,"tsc":500,"cpu":0,"event":"vm-end","vm":"b<i>","reason":"exit","status":33}
    "#;

    pub(crate) fn run() -> Vec<Event> {
        parse_lines(RUN).unwrap()
    }

    #[test]
    fn who_ran_where_with_which_flag() {
        let timeline = Timeline::of(&run());
        assert_eq!((timeline.start, timeline.end), (100, 500));
        assert_eq!(timeline.cpus, [0, 1]);
        let names: Vec<String> = timeline.vcpus.iter().map(Vcpu::name).collect();
        assert_eq!(names, ["a/0", "b<i>/0"]);
        let span = |from, to, cpu, vcpu, disabled| Span { from, to, cpu, vcpu, disabled };
        let expected = [
            span(200, 250, 0, 0, false),
            span(250, 300, 0, 0, true),
            span(320, 400, 0, 1, false),
            span(350, 500, 1, 0, true),
        ];
        assert_eq!(timeline.spans, expected);
        let turns = timeline.turns(0).into_iter().map(|turn| (turn.from, turn.to, turn.vcpu));
        assert_eq!(turns.collect::<Vec<_>>(), [(200, 300, 0), (320, 400, 1)]);
    }

    #[test]
    fn the_real_bit_is_its_cores() {
        let timeline = Timeline::of(&run());
        let of = |core| {
            let Core { cpus, bit } = &timeline.cores[&core];
            let bit = bit.iter().map(|Written { at, on, .. }| (*at, *on));
            (cpus.clone(), bit.collect::<Vec<_>>())
        };
        let changes = [(120, true), (251, false), (310, true), (330, false), (332, true)];
        assert_eq!(of(0), (vec![0], changes.to_vec()));
        assert_eq!(of(1), (vec![1], vec![]));
    }

    #[test]
    fn what_was_done_is_marked_where_it_was() {
        let timeline = Timeline::of(&run());
        let marks = |vcpu: usize| {
            let marks = timeline.vcpus[vcpu].marks.iter();
            marks.map(|mark| (mark.at, &*mark.name)).collect::<Vec<_>>()
        };
        assert_eq!(marks(0), [(250, "#AC: warn")]);
        assert_eq!(marks(1), [(333, "#AC: step"), (340, "0x33: gp")]);
        let details = &timeline.vcpus[0].marks[0].details;
        assert_eq!(details[0], ("rip", "0x10".to_owned()));
        assert_eq!(details[2], ("bytes", "f0830001".to_owned()));
    }

    #[test]
    fn time_is_exact_as_far_as_it_is_known() {
        let clock = Clock::of(100, Some(3_000_000));
        assert_eq!((clock.nanoseconds(103), clock.nanoseconds(7)), (1000, 0));
        assert_eq!((clock.nanoseconds(104), clock.time(3_000_100)), (1333, "1.000000".to_owned()));
        let ticks = Clock::of(100, None);
        assert_eq!((ticks.time(350), ticks.unit()), ("250".to_owned(), "ticks"));
        assert_eq!(Clock::of_run(&run(), None), Clock::of(100, Some(1_000_000)));
        assert_eq!(Clock::of_run(&run(), Some(4)), Clock::of(100, Some(4)));
        assert_eq!(Clock::of_run(&[], None), Clock::of(0, None));
        assert_eq!(Clock::of(0, Some(1)).nanoseconds(u64::MAX), u64::MAX);
    }
}
