//! Where a vCPU's guest splits locks: the places that do it most.
//!
//! A guest has as many instructions as it likes, a table few places. When it is full, a new place takes
//! that of the rarest one and remembers how often that was: so often, at most, it may have been seen
//! and forgotten before. This is the algorithm Space-Saving (Metwally, Agrawal and El Abbadi, 2005):
//! of n split locks, every place that has more than n / [`PLACES`] of them is in the table.

use alloc::boxed::Box;
use core::fmt;

use arrayvec::ArrayVec;
use vmx::emulate;
use vmx::emulate::operand::CodeSize;
use vmx::run::InstructionBytes;
use vmx::split_lock::{AcOutcome, AcReport};

use crate::counters::SplitLocks;
use crate::events::{self, Hex, Object, Stamp, Subject};

/// Places that a table holds.
pub const PLACES: usize = 16;

/// A place in a guest.
#[derive(Debug, Clone, Copy)]
pub struct Offender {
    /// RIP: an offset into CS.
    pub rip: u64,
    /// CR3: the address space.
    pub cr3: u64,
    /// Privilege level at the first time.
    cpl: u8,
    /// How code was executed there.
    code: CodeSize,
    /// What stood there.
    instruction: InstructionBytes,
    /// How often, by what was done, since it is in the table.
    pub counts: SplitLocks,
    /// It may have been seen so many times before, and forgotten: at most.
    pub missed: u64,
    /// The first and the last time since it is in the table (TSC).
    first: u64,
    last: u64,
}

impl Offender {
    fn new(report: &AcReport, tsc: u64, missed: u64) -> Self {
        Self {
            rip: report.rip,
            cr3: report.cr3,
            cpl: report.context.cpl,
            code: report.code,
            instruction: report.instruction,
            counts: SplitLocks::new(),
            missed,
            first: tsc,
            last: tsc,
        }
    }

    fn is_at(&self, report: &AcReport) -> bool {
        self.rip == report.rip && self.cr3 == report.cr3
    }

    fn count(&mut self, outcome: AcOutcome, tsc: u64) {
        self.counts.count(outcome, false);
        self.last = tsc;
    }

    /// How often it raised #AC, at most.
    fn at_most(&self) -> u64 {
        self.counts.all() + self.missed
    }

    /// The instruction's own bytes, without those behind it.
    pub fn bytes(&self) -> Hex<'_> {
        let bytes = self.instruction.as_slice();
        Hex(&bytes[..emulate::length(bytes, self.code).min(bytes.len())])
    }

    fn write(&self, json: &mut Object<'_>, (vm, vcpu): Subject) -> fmt::Result {
        json.text("vm", vm)?;
        json.number("vcpu", vcpu)?;
        json.address("rip", self.rip)?;
        json.address("cr3", self.cr3)?;
        json.number("cpl", self.cpl)?;
        json.number("bits", self.code.bits())?;
        json.number("count", self.counts.seen())?;
        json.number("missed", self.missed)?;
        json.object("verdicts", |json| self.counts.write(json))?;
        json.number("first", self.first)?;
        json.number("last", self.last)?;
        json.text("bytes", Hex(self.instruction.as_slice()))
    }
}

/// A vCPU's table. What may be an ordinary alignment check is not in it.
#[derive(Debug)]
pub struct Offenders {
    places: Box<ArrayVec<Offender, PLACES>>,
    /// So many of them are written out.
    told: usize,
}

impl Offenders {
    /// What one takes on the heap.
    #[cfg(not(test))]
    pub const BYTES: usize = size_of::<ArrayVec<Offender, PLACES>>();

    /// An empty table.
    pub fn new() -> Self {
        Self { places: Box::new(ArrayVec::new()), told: 0 }
    }

    /// Counts an #AC of this time (TSC).
    pub fn count(&mut self, report: &AcReport, tsc: u64) {
        if report.context.legacy() {
            return;
        }
        let known = self.places.iter().position(|place| place.is_at(report));
        let index = known.unwrap_or_else(|| self.add(report, tsc));
        if let Some(place) = self.places.get_mut(index) {
            place.count(report.outcome, tsc);
        }
    }

    /// Makes room for a new place: which one it is.
    fn add(&mut self, report: &AcReport, tsc: u64) -> usize {
        let Err(full) = self.places.try_push(Offender::new(report, tsc, 0)) else {
            return self.places.len() - 1;
        };
        // Of those that are equally rare the one that was not seen for longest.
        let mut rarest = 0;
        for (index, place) in self.places.iter().enumerate() {
            let least = &self.places[rarest];
            if (place.at_most(), place.last) < (least.at_most(), least.last) {
                rarest = index;
            }
        }
        let missed = self.places[rarest].at_most();
        self.places[rarest] = Offender { missed, ..full.element() };
        rarest
    }

    /// The places, in no order.
    pub fn places(&self) -> &[Offender] {
        &self.places
    }

    /// Whether all of them are written out.
    pub fn is_told(&self) -> bool {
        self.told == self.places.len()
    }

    /// Writes the next one out; false if there is none, or another CPU has the port. `stamp` is asked
    /// only if it is written.
    pub fn write_one(&mut self, stamp: impl FnOnce() -> Stamp, subject: Subject) -> bool {
        let Some(place) = self.places.get(self.told) else { return false };
        let written = events::try_write(stamp, "offender", |json| place.write(json, subject));
        self.told += usize::from(written);
        written
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use sld::{AcContext, Source};
    use std::collections::BTreeMap;
    use std::vec::Vec;

    /// A step of an instruction there.
    pub fn report(rip: u64, cr3: u64) -> AcReport {
        AcReport {
            source: Source::Msr,
            rip,
            cr3,
            context: AcContext { cpl: 3, cr0_am: false, eflags_ac: true },
            virtual_bit: false,
            outcome: AcOutcome::Step,
            first: false,
            code: CodeSize::Bits64,
            instruction: InstructionBytes::new([0x90; 15], 15),
        }
    }

    /// Counts this stream of RIPs, the n-th at time n; what it really was.
    fn counted(stream: impl IntoIterator<Item = u64>) -> (Offenders, BTreeMap<u64, u64>) {
        let (mut table, mut truth) = (Offenders::new(), BTreeMap::new());
        for (tsc, rip) in (0..).zip(stream) {
            table.count(&report(rip, 0), tsc);
            *truth.entry(rip).or_default() += 1;
        }
        (table, truth)
    }

    fn place(table: &Offenders, rip: u64) -> Option<&Offender> {
        table.places().iter().find(|place| place.rip == rip)
    }

    /// Numbers that repeat after a long time only.
    fn random(seed: u64) -> impl Iterator<Item = u64> {
        let next = |state: &u64| {
            Some(
                state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407),
            )
        };
        core::iter::successors(Some(seed), next).map(|state| state >> 33)
    }

    #[test]
    fn few_places_are_counted_exactly() {
        for seed in 0..20 {
            let (table, truth) = counted(random(seed).map(|n| n % PLACES as u64).take(3000));
            assert_eq!(table.places().len(), truth.len());
            for place in table.places() {
                assert_eq!((place.counts.seen(), place.missed), (truth[&place.rip], 0));
            }
        }
    }

    #[test]
    fn what_is_said_of_many_places_is_true() {
        for seed in 0..50 {
            // Some places are much more frequent than others.
            let stream: Vec<u64> = random(seed)
                .take(5000)
                .map(|n| n % (1 + (n >> 8) % (1 + (n >> 16) % 200)))
                .collect();
            let (table, truth) = counted(stream.iter().copied());
            assert_eq!(table.places().len(), PLACES.min(truth.len()));
            for place in table.places() {
                let (sure, most) = (place.counts.seen(), place.at_most());
                assert!((sure..=most).contains(&truth[&place.rip]), "{place:x?}");
                let times = (0..).zip(&stream).filter(|(_, rip)| **rip == place.rip);
                let times: Vec<u64> = times.map(|(tsc, _)| tsc).collect();
                assert_eq!(Some(&place.last), times.last());
                assert_eq!(place.first, times[times.len() - sure as usize]);
            }
            for (rip, count) in truth {
                let frequent = count > (stream.len() / PLACES) as u64;
                assert!(!frequent || place(&table, rip).is_some(), "{rip:#x}: {count}");
            }
        }
    }

    #[test]
    fn a_flood_of_places_does_not_wash_the_frequent_one_away() {
        const FREQUENT: u64 = 0xf00d;
        // One in ten, among places that never come again.
        let flood = (0..100_000).map(|n| if n % 10 == 9 { FREQUENT } else { 0x10_0000 + n });
        let (table, _) = counted(flood);
        let frequent = place(&table, FREQUENT).expect("it is the most frequent one");
        assert_eq!((frequent.counts.seen(), frequent.missed), (10_000, 0));
        let others = table.places().iter().filter(|place| place.rip != FREQUENT);
        assert!(others.clone().all(|place| place.counts.seen() == 1 && place.missed > 5000));
        assert_eq!(others.count(), PLACES - 1);
    }

    #[test]
    fn address_spaces_are_told_apart_and_verdicts_counted() {
        let mut table = Offenders::new();
        for (cr3, outcome) in [
            (0x1000, AcOutcome::Throttle),
            (0x2000, AcOutcome::Warn),
            (0x1000, AcOutcome::Step),
            (0x1000, AcOutcome::Step),
        ] {
            table.count(&AcReport { outcome, ..report(7, cr3) }, cr3);
        }
        let context = AcContext { cpl: 3, cr0_am: true, eflags_ac: true };
        table.count(&AcReport { context, ..report(8, 0) }, 0);
        assert_eq!(std::format!("{}", table.places()[0].bytes()), "90");
        let [one, two] = table.places() else { panic!("{table:x?}") };
        assert_eq!((one.cr3, one.counts.seen(), one.counts.all()), (0x1000, 2, 3));
        assert_eq!((two.cr3, two.counts.of(AcOutcome::Warn)), (0x2000, 1));
    }

    #[test]
    fn an_offender_is_an_event() {
        let (table, _) = counted([7, 8, 7]);
        let written = events::object(|json| table.places()[0].write(json, ("a", 1)));
        assert_eq!(
            written,
            r#"{"vm":"a","vcpu":1,"rip":"0x7","cr3":"0x0","cpl":3,"bits":64,"count":2,"missed":0,"verdicts":{"inject":0,"warn":0,"step":2,"emulate":0,"again":0,"throttle":0,"kill":0,"kill-bogus":0},"first":0,"last":2,"bytes":"909090909090909090909090909090"}"#
        );
    }
}
