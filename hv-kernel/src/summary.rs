//! What is left to read at the end: what became of each VM, or why there was none.

use core::fmt::{self, Write};

use arrayvec::{ArrayString, ArrayVec};
use log::Level;
use raw_cpuid::{CpuId, CpuIdReaderNative};
use sld::{Detection, Policy, Source};
use spin::Mutex;
use vmx::split_lock::AcOutcome;

use crate::config::{AtEnd, MAX_NAME, MAX_VMS};
use crate::console::Console;
use crate::counters::SplitLocks;
use crate::offenders::Offender;
use crate::screen::{Colour, Screen};

/// The longest text about how a VM ended, and about why it cannot start.
const MAX_END: usize = 60;
const MAX_WHY: usize = 200;
/// The longest line of the table.
const MAX_LINE: usize = 320;
/// How many rows the table has: a VM that is started again has one more.
const MAX_ROWS: usize = 2 * MAX_VMS;
/// Places in guests that are remembered, and those that are shown.
const MAX_PLACES: usize = 64;
const SHOWN_PLACES: usize = 5;
/// Rows of the page that are not the table's.
const OTHER_ROWS: usize = 15;

/// What the page tells. Filled in as it happens; nothing is allocated, since VMs end on guests' paths.
static RUN: Mutex<Run> = Mutex::new(Run {
    host: None,
    vms: ArrayVec::new_const(),
    left_out: SplitLocks::new(),
    places: ArrayVec::new_const(),
});

struct Run {
    host: Option<Host>,
    /// In the configuration's order; then those that were started again.
    vms: ArrayVec<Row, MAX_ROWS>,
    /// Split locks of those that there is no room for.
    left_out: SplitLocks,
    /// Where guests split locks, as far as there is room for it.
    places: ArrayVec<Place, MAX_PLACES>,
}

/// The machine, once it is up.
#[derive(Debug, Clone, Copy)]
pub struct Host {
    /// How many CPUs are used.
    pub cpus: u32,
    /// What the operator wants.
    pub mode: Policy,
    /// Where the split locks of VMs that say nothing are detected.
    pub source: Source,
    /// What the CPUs can do.
    pub detection: Detection,
}

/// A VM.
#[derive(Debug)]
struct Row {
    name: ArrayString<MAX_NAME>,
    policy: Option<Policy>,
    vcpus: u32,
    split_locks: SplitLocks,
    end: Short<MAX_END>,
    /// That of the end.
    colour: Colour,
    /// Why it cannot start, if it cannot.
    why: Short<MAX_WHY>,
}

/// An instruction of a VM that splits locks, whichever vCPU executes it.
#[derive(Debug)]
struct Place {
    vm: &'static str,
    rip: u64,
    cr3: u64,
    /// How often it did, and how often it may have done besides, unnoticed.
    count: u64,
    missed: u64,
    /// The instruction in hexadecimal.
    bytes: Short<30>,
}

impl Row {
    fn new(name: &str, policy: Option<Policy>, vcpus: u32) -> Self {
        Self {
            name: ArrayString::from(name).unwrap_or_default(),
            policy,
            vcpus,
            split_locks: SplitLocks::new(),
            end: Short::of(format_args!("still running")),
            colour: Colour::Text,
            why: Short::new(),
        }
    }
}

/// How it all ended.
#[derive(Debug, Clone, Copy)]
pub enum Ending<'a> {
    /// All VMs are over.
    Finished {
        /// VM exits.
        exits: u64,
        /// Invariants that did not hold.
        violations: u64,
    },
    /// The hypervisor does not run here.
    Refused(&'a str),
}

/// The machine is up.
pub fn host(host: Host) {
    RUN.lock().host = Some(host);
}

/// A VM is made.
pub fn started(name: &str, policy: Policy, vcpus: u32) {
    add(Row::new(name, Some(policy), vcpus));
}

/// A VM cannot start.
pub fn refused(name: &str, why: impl fmt::Display) {
    let end = Short::of(format_args!("cannot start"));
    let why = Short::of(format_args!("{why}"));
    add(Row { end, colour: Colour::Error, why, ..Row::new(name, None, 0) });
}

fn add(row: Row) {
    RUN.lock().add(row);
}

/// A VM has another policy.
pub fn policy(name: &str, policy: Policy) {
    if let Some(row) = RUN.lock().latest(name) {
        row.policy = Some(policy);
    }
}

/// A VM is over.
pub fn ended(name: &str, how: fmt::Arguments<'_>, colour: Colour, split_locks: &SplitLocks) {
    if let Some(row) = RUN.lock().latest(name) {
        (row.end, row.colour, row.split_locks) = (Short::of(how), colour, *split_locks);
    }
}

/// A vCPU of this VM is over, and these are the places where its guest has split locks.
pub fn offenders(vm: &'static str, places: &[Offender]) {
    let mut run = RUN.lock();
    places
        .iter()
        .filter(|place| place.counts.seen() > 0)
        .for_each(|place| run.add_place(vm, place));
}

/// Writes the table into the log, and shows the page on the screen.
pub fn show(console: &mut Console, ending: Ending<'_>, at_end: AtEnd) {
    let run = RUN.lock();
    if let Ending::Finished { .. } = ending {
        let mut log = Unseen { console, line: Short::new(), is_kept_only: false };
        log.line(Colour::Text, format_args!(""));
        run.table(&mut log, MAX_ROWS);
        run.totals(&mut log, ending);
        // For those who have no events: others see the instructions' text and symbols, by xtask.
        log.is_kept_only = true;
        run.instructions(&mut log, 1 + SHOWN_PLACES);
    }
    let is_kept = console.is_kept();
    if console.screen.exists() {
        console.screen.clear();
        run.page(&mut Page::new(&mut console.screen), ending, at_end, is_kept);
    }
}

/// What somebody who reads can do now, for the end of a panic.
pub fn show_advice(console: &mut Console, at_end: AtEnd) {
    let is_kept = console.is_kept();
    if console.screen.exists() {
        advice(&mut Page::new(&mut console.screen), at_end, is_kept);
    }
}

impl Run {
    /// Adds a row. Without room, the oldest one of the same VM goes: each has one, and there are as
    /// many more.
    fn add(&mut self, row: Row) {
        if self.vms.is_full()
            && let Some(index) = self.vms.iter().position(|old| old.name == row.name)
        {
            self.left_out.add(&self.vms.remove(index).split_locks);
        }
        let _ = self.vms.try_push(row);
    }

    /// The row of the VM of this name, of those that it has the last.
    fn latest(&mut self, name: &str) -> Option<&mut Row> {
        self.vms.iter_mut().rev().find(|row| &*row.name == name)
    }

    fn page(&self, page: &mut Page<impl Paper>, ending: Ending<'_>, at_end: AtEnd, is_kept: bool) {
        page.line(Colour::Text, format_args!(""));
        page.line(Colour::Text, format_args!("CPU        {}", CpuName));
        if let Some(host) = self.host {
            page.line(Colour::Text, format_args!("CPUs used  {}", host.cpus));
            let (colour, text) = host.detection_text();
            page.line(colour, format_args!("Detection  {text}"));
        }
        page.line(Colour::Text, format_args!(""));
        match ending {
            Ending::Finished { .. } => {
                let rows = page.paper.size().1.saturating_sub(OTHER_ROWS).max(2);
                let used = self.table(page, rows);
                let used = used + self.reasons(page, rows - used);
                if let Some(left) = (rows - used).checked_sub(1) {
                    self.instructions(page, left);
                }
                page.line(Colour::Text, format_args!(""));
                self.totals(page, ending);
            }
            Ending::Refused(why) => {
                page.line(Colour::Heading, format_args!("The hypervisor cannot run here:"));
                page.line(Colour::Text, format_args!(""));
                page.wrapped(Colour::Error, why);
            }
        }
        advice(page, at_end, is_kept);
    }

    /// At most so many rows below the heading; how many there are.
    fn table(&self, lines: &mut impl Lines, rows: usize) -> usize {
        let name = self.vms.iter().map(|row| row.name.len()).max().unwrap_or(0).max(2);
        let policies = self.vms.iter().map(|row| policy_text(row.policy).0.len());
        let policy = policies.max().unwrap_or(0).max("policy".len());
        let verdicts = self.vms.iter().map(|row| Verdicts(row.split_locks).text().0.len());
        let verdict = verdicts.max().unwrap_or(0).max("verdict".len());
        lines.line(
            Colour::Heading,
            format_args!(
                "{:name$}  {:policy$}  vCPUs  split locks  {:verdict$}  how it ended",
                "VM", "policy", "verdict"
            ),
        );
        let shown = if self.vms.len() > rows { rows.saturating_sub(1) } else { rows };
        for row in self.vms.iter().take(shown) {
            let shown_policy = policy_text(row.policy);
            let vcpus: Short<8> = match row.vcpus {
                0 => Short::of(format_args!("-")),
                vcpus => Short::of(format_args!("{vcpus}")),
            };
            lines.part(
                Colour::Text,
                format_args!(
                    "{:name$}  {:policy$}  {:<5}  {:<11}  {:verdict$}  ",
                    &*row.name,
                    &*shown_policy.0,
                    &*vcpus.0,
                    row.split_locks.seen(),
                    &*Verdicts(row.split_locks).text().0
                ),
            );
            lines.line(row.colour, format_args!("{}", &*row.end.0));
        }
        if self.vms.len() > shown {
            let more = self.vms.len() - shown;
            lines.line(Colour::Faint, format_args!("and {more} more: the log has them"));
        }
        self.vms.len().min(rows)
    }

    fn add_place(&mut self, vm: &'static str, new: &Offender) {
        let (count, missed) = (new.counts.seen(), new.missed);
        let known = |place: &&mut Place| (place.vm, place.rip, place.cr3) == (vm, new.rip, new.cr3);
        if let Some(place) = self.places.iter_mut().find(known) {
            place.count += count;
            place.missed += missed;
            return;
        }
        let bytes = Short::of(format_args!("{}", new.bytes()));
        let place = Place { vm, rip: new.rip, cr3: new.cr3, count, missed, bytes };
        if let Err(full) = self.places.try_push(place)
            && let Some(rarest) = self.places.iter_mut().min_by_key(|place| place.count)
            && rarest.count < count
        {
            *rarest = full.element();
        }
    }

    /// Which instructions split the most locks, in so many rows at most: none for less than two.
    fn instructions(&self, lines: &mut impl Lines, rows: usize) {
        let mut places: ArrayVec<&Place, MAX_PLACES> = self.places.iter().collect();
        places.sort_unstable_by_key(|place| (core::cmp::Reverse(place.count), place.vm, place.rip));
        places.truncate(rows.saturating_sub(1).min(SHOWN_PLACES));
        if places.is_empty() {
            return;
        }
        let name = places.iter().map(|place| place.vm.len()).max().unwrap_or(0).max(2);
        lines.line(Colour::Text, format_args!(""));
        lines.line(
            Colour::Heading,
            format_args!(
                "{:name$}  {:18}  {:11}  most frequent instructions",
                "VM", "RIP", "split locks"
            ),
        );
        for Place { vm, rip, count, missed, bytes, .. } in places {
            let times: Short<24> = match missed {
                0 => Short::of(format_args!("{count}")),
                _ => Short::of(format_args!("{count} or more")),
            };
            lines.line(
                Colour::Text,
                format_args!("{vm:name$}  {rip:<#18x}  {:11}  {bytes}", &*times.0),
            );
        }
    }

    /// Why VMs cannot start, as far as so many rows are enough: how many it took. The log has it
    /// anyway.
    fn reasons(&self, page: &mut Page<impl Paper>, rows: usize) -> usize {
        let mut used = 0;
        for row in self.vms.iter().filter(|row| !row.why.0.is_empty()) {
            let text: Short<{ MAX_WHY + MAX_NAME + 2 }> =
                Short::of(format_args!("{}: {}", row.name, row.why));
            let height = 1 + page.height(&text.0);
            if used + height > rows {
                break;
            }
            used += height;
            page.line(Colour::Text, format_args!(""));
            page.wrapped(Colour::Error, &text.0);
        }
        used
    }

    fn totals(&self, lines: &mut impl Lines, ending: Ending<'_>) {
        let Ending::Finished { exits, violations } = ending else { return };
        let mut sum = self.left_out;
        self.vms.iter().for_each(|row| sum.add(&row.split_locks));
        let is_first = |(index, row): &(usize, &Row)| {
            self.vms[..*index].iter().all(|other| other.name != row.name)
        };
        let vms = self.vms.iter().enumerate().filter(is_first).count();
        lines.line(
            Colour::Text,
            format_args!(
                "{vms} VM{}, {} split lock{} seen, {exits} VM exits",
                plural(vms as u64),
                sum.seen(),
                plural(sum.seen())
            ),
        );
        if violations > 0 {
            lines.line(
                Colour::Error,
                format_args!("invariants that did not hold: {violations}; the log says which"),
            );
        }
    }
}

fn plural(number: u64) -> &'static str {
    if number == 1 { "" } else { "s" }
}

/// What somebody who reads can do now.
fn advice(page: &mut Page<impl Paper>, at_end: AtEnd, is_kept: bool) {
    page.line(Colour::Text, format_args!(""));
    match at_end {
        AtEnd::Stay => {
            page.line(Colour::Good, format_args!("Press a key to restart the machine."));
            if is_kept {
                page.wrapped(
                    Colour::Text,
                    "If no key works, use the reset button. When the stick boots again, it saves \
                     the log as unsplit/log.txt; if the machine is switched off, the log is lost.",
                );
            } else {
                page.wrapped(Colour::Text, "Or switch it off.");
            }
        }
        AtEnd::PowerOff => {
            page.line(Colour::Text, format_args!("The machine switches itself off."))
        }
        AtEnd::Reboot => page.line(Colour::Text, format_args!("The machine starts again.")),
    }
}

impl Host {
    fn detection_text(self) -> (Colour, Short<MAX_LINE>) {
        let mode = self.mode;
        if self.source == Source::Trace && mode != Policy::Off {
            return (Colour::Good, Short::of(format_args!("by tracing, mode {mode}")));
        }
        match self.detection {
            Detection::Works if self.source == Source::None && mode != Policy::Off => (
                Colour::Warning,
                Short::of(format_args!("none (source none): split locks happen unseen")),
            ),
            Detection::Works if mode == Policy::Off => {
                (Colour::Text, Short::of(format_args!("by the CPU, switched off (mode off)")))
            }
            Detection::Works => {
                (Colour::Good, Short::of(format_args!("by the CPU (MSR 0x33), mode {mode}")))
            }
            Detection::Absent if mode == Policy::Off => {
                (Colour::Text, Short::of(format_args!("not on this CPU, mode off")))
            }
            Detection::Absent => (
                Colour::Warning,
                Short::of(format_args!(
                    "not on this CPU: mode {mode} is without effect, split locks happen unseen"
                )),
            ),
            Detection::Failed(why) => {
                (Colour::Error, Short::of(format_args!("does not work on this CPU: {why}")))
            }
        }
    }
}

/// The CPU's name for itself.
struct CpuName;

impl fmt::Display for CpuName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let brand = CpuId::with_cpuid_reader(CpuIdReaderNative).get_processor_brand_string();
        f.write_str(brand.as_ref().map_or("of no name", |brand| brand.as_str().trim()))
    }
}

/// A VM's policy; nothing is known of one for a VM that cannot start.
fn policy_text(policy: Option<Policy>) -> Short<16> {
    match policy {
        Some(policy) => Short::of(format_args!("{policy}")),
        None => Short::of(format_args!("-")),
    }
}

/// What was done about split locks, as in the events.
struct Verdicts(SplitLocks);

impl Verdicts {
    fn text(&self) -> Short<64> {
        let mut text = Short::new();
        for outcome in AcOutcome::ALL {
            let (name, count) = (outcome.as_str(), self.0.of(outcome));
            let separator = if text.0.is_empty() { "" } else { ", " };
            // What is too long is cut.
            let _ = match count {
                0 => Ok(()),
                1 => write!(text, "{separator}{name}"),
                _ => write!(text, "{separator}{name} x{count}"),
            };
        }
        if text.0.is_empty() {
            text.0.push('-');
        }
        text
    }
}

/// Text that is cut if it is too long.
#[derive(Debug)]
struct Short<const N: usize>(ArrayString<N>);

impl<const N: usize> Short<N> {
    fn new() -> Self {
        Self(ArrayString::new())
    }

    fn of(text: fmt::Arguments<'_>) -> Self {
        let mut short = Self::new();
        let _ = short.write_fmt(text);
        short
    }
}

impl<const N: usize> Write for Short<N> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            if self.0.try_push(character).is_err() {
                break;
            }
        }
        Ok(())
    }
}

impl<const N: usize> fmt::Display for Short<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where lines go.
trait Lines {
    /// Adds to the line.
    fn part(&mut self, colour: Colour, text: fmt::Arguments<'_>);

    /// Adds to the line and ends it.
    fn line(&mut self, colour: Colour, text: fmt::Arguments<'_>);
}

/// The log, but not the screen.
struct Unseen<'a> {
    console: &'a mut Console,
    line: Short<MAX_LINE>,
    /// Not for the serial ports either.
    is_kept_only: bool,
}

impl Lines for Unseen<'_> {
    fn part(&mut self, _: Colour, text: fmt::Arguments<'_>) {
        let _ = self.line.write_fmt(text);
    }

    fn line(&mut self, colour: Colour, text: fmt::Arguments<'_>) {
        self.part(colour, text);
        let line = self.line.0.trim_end();
        if self.is_kept_only {
            self.console.log(Level::Debug, format_args!("{line}"));
        } else {
            self.console.write_unseen(format_args!("{line}"));
        }
        self.line.0.clear();
    }
}

/// What a page is written on.
trait Paper {
    /// Columns and rows.
    fn size(&self) -> (usize, usize);
    fn write(&mut self, colour: Colour, text: fmt::Arguments<'_>);
    fn end_line(&mut self);
}

impl Paper for Screen {
    fn size(&self) -> (usize, usize) {
        Self::size(self)
    }

    fn write(&mut self, colour: Colour, text: fmt::Arguments<'_>) {
        Self::write(self, colour, text);
    }

    fn end_line(&mut self) {
        Self::end_line(self);
    }
}

/// A page, with an edge on the left.
struct Page<'a, P: Paper> {
    paper: &'a mut P,
    is_new_line: bool,
}

/// What begins with a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begins {
    Text,
    Line,
    Word,
}

/// The edge in columns.
const EDGE: usize = 2;
/// The longest line of a text: longer ones are hard to read.
const MAX_WIDTH: usize = 100;

impl<'a, P: Paper> Page<'a, P> {
    fn new(paper: &'a mut P) -> Self {
        Self { paper, is_new_line: true }
    }

    /// Writes a text in lines that end between words.
    fn wrapped(&mut self, colour: Colour, text: &str) {
        for (begins, word) in self.words(text) {
            match begins {
                Begins::Text => {}
                Begins::Line => self.line(colour, format_args!("")),
                Begins::Word => self.part(colour, format_args!(" ")),
            }
            self.part(colour, format_args!("{word}"));
        }
        self.line(colour, format_args!(""));
    }

    /// How many rows [`Self::wrapped`] takes.
    fn height(&self, text: &str) -> usize {
        1 + self.words(text).filter(|(begins, _)| *begins == Begins::Line).count()
    }

    fn words<'t>(&self, text: &'t str) -> impl Iterator<Item = (Begins, &'t str)> + use<'t, P> {
        let width = self.paper.size().0.saturating_sub(2 * EDGE).min(MAX_WIDTH);
        let mut used = 0;
        text.split_whitespace().map(move |word| {
            let length = word.chars().count();
            let begins = match used {
                0 => Begins::Text,
                _ if used + 1 + length > width => Begins::Line,
                _ => Begins::Word,
            };
            used = if begins == Begins::Word { used + 1 + length } else { length };
            (begins, word)
        })
    }
}

impl<P: Paper> Lines for Page<'_, P> {
    fn part(&mut self, colour: Colour, text: fmt::Arguments<'_>) {
        if core::mem::take(&mut self.is_new_line) {
            self.paper.write(Colour::Text, format_args!("{:EDGE$}", ""));
        }
        self.paper.write(colour, text);
    }

    fn line(&mut self, colour: Colour, text: fmt::Arguments<'_>) {
        self.part(colour, text);
        self.paper.end_line();
        self.is_new_line = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offenders::Offenders;
    use crate::offenders::tests::report;
    use std::string::String;
    use std::{format, vec::Vec};
    use vmx::split_lock::AcOutcome::{Inject, Kill, Warn};

    struct Sheet {
        size: (usize, usize),
        text: String,
    }

    impl Sheet {
        fn new(columns: usize, rows: usize) -> Self {
            Self { size: (columns, rows), text: String::new() }
        }
    }

    impl Paper for Sheet {
        fn size(&self) -> (usize, usize) {
            self.size
        }

        fn write(&mut self, _: Colour, text: fmt::Arguments<'_>) {
            self.text += &format!("{text}");
        }

        fn end_line(&mut self) {
            self.text.truncate(self.text.trim_end_matches(' ').len());
            self.text.push('\n');
        }
    }

    fn locks(counts: &[(AcOutcome, u32)], legacy: bool) -> SplitLocks {
        let mut locks = SplitLocks::new();
        for (outcome, count) in counts {
            (0..*count).for_each(|_| locks.count(*outcome, legacy));
        }
        locks
    }

    fn row(name: &str, split_locks: SplitLocks, end: &str) -> Row {
        let end = Short::of(format_args!("{end}"));
        Row { split_locks, end, ..Row::new(name, Some(Policy::Warn), 2) }
    }

    fn empty() -> Run {
        Run {
            host: None,
            vms: ArrayVec::new(),
            left_out: SplitLocks::new(),
            places: ArrayVec::new(),
        }
    }

    fn run() -> Run {
        let mut run = empty();
        run.vms.push(row("split", locks(&[(Warn, 1)], false), "exit 33"));
        run.vms.push(row("sld-aware", locks(&[(Inject, 4), (Kill, 1)], false), "split lock"));
        run.vms.push(row("legacy", locks(&[(Inject, 6)], true), "still running"));
        run.vms.push(Row {
            end: Short::of(format_args!("cannot start")),
            why: Short::of(format_args!("the ramdisk has no file `a`: add it, or correct `image`")),
            ..Row::new("none", None, 0)
        });
        run
    }

    const FINISHED: Ending<'_> = Ending::Finished { exits: 77, violations: 0 };

    #[test]
    fn the_table_has_a_row_for_every_vm() {
        let mut sheet = Sheet::new(80, 25);
        run().table(&mut Page::new(&mut sheet), 10);
        let expected = "  \
  VM         policy  vCPUs  split locks  verdict          how it ended
  split      warn    2      1            warn             exit 33
  sld-aware  warn    2      5            inject x4, kill  split lock
  legacy     warn    2      0            inject x6        still running
  none       -       -      0            -                cannot start
";
        assert_eq!(sheet.text, expected);
    }

    #[test]
    fn a_page_shows_all_that_there_is_room_for() {
        let mut run = run();
        while run.vms.len() < MAX_VMS {
            let name = format!("another-{}", run.vms.len());
            run.vms.push(row(&name, SplitLocks::new(), "halt"));
        }
        for rows in [10, 25, 48, 80] {
            let mut sheet = Sheet::new(80, rows);
            run.host = Some(Host {
                cpus: 4,
                mode: Policy::Warn,
                source: Source::None,
                detection: Detection::Absent,
            });
            run.page(&mut Page::new(&mut sheet), FINISHED, AtEnd::Stay, true);
            // The title is above.
            let lines = sheet.text.lines().count() + 1;
            assert!(lines <= rows.max(OTHER_ROWS + 2), "{lines} of {rows}:\n{}", sheet.text);
            let hidden = sheet.text.contains("more: the log has them");
            assert_eq!(hidden, rows < MAX_VMS + OTHER_ROWS, "{rows}:\n{}", sheet.text);
            assert!(sheet.text.contains("64 VMs, 6 split locks seen, 77 VM exits"));
        }
    }

    fn place(vm: &'static str, rip: u64, count: u64, missed: u64) -> Place {
        let bytes = Short::of(format_args!("f00107"));
        Place { vm, rip, cr3: 0, count, missed, bytes }
    }

    #[test]
    fn places_of_a_vms_vcpus_are_one_and_the_rarest_are_forgotten() {
        let mut run = empty();
        let mut add = |vm, rip, times| {
            let mut table = Offenders::new();
            (0..times).for_each(|tsc| table.count(&report(rip, 0), tsc));
            run.add_place(vm, &table.places()[0]);
            let mut counts: Vec<_> = run.places.iter().map(|p| (p.vm, p.rip, p.count)).collect();
            counts.sort_unstable();
            counts
        };
        add("a", 1, 3);
        add("b", 1, 5);
        assert_eq!(add("a", 1, 4), [("a", 1, 7), ("b", 1, 5)]);
        (2..MAX_PLACES as u64).for_each(|rip| drop(add("a", rip, 2)));
        assert_eq!(add("c", 1, 2).len(), MAX_PLACES);
        let counts = add("c", 1, 9);
        assert_eq!((counts.len(), counts.last()), (MAX_PLACES, Some(&("c", 1, 9))));
        assert!(counts.contains(&("a", 1, 7)) && counts.contains(&("b", 1, 5)));
    }

    #[test]
    fn the_most_frequent_instructions_are_shown_where_there_is_room() {
        let mut run = run();
        for (rip, count) in [(0x10, 3), (0x20, 70), (0x30, 2), (0x40, 1), (0x50, 9), (0x60, 4)] {
            run.places.push(place("split", rip, count, u64::from(rip == 0x50)));
        }
        let shown = |rows| {
            let mut sheet = Sheet::new(80, 25);
            run.instructions(&mut Page::new(&mut sheet), rows);
            sheet.text
        };
        let expected = "

  VM     RIP                 split locks  most frequent instructions
  split  0x20                70           f00107
  split  0x50                9 or more    f00107
";
        assert_eq!(shown(3), expected.replacen('\n', "", 1));
        assert_eq!(shown(9).lines().count(), 2 + SHOWN_PLACES);
        assert_eq!((shown(1), shown(0)), (String::new(), String::new()));
        // Four VMs, an empty row and two for the reason; an empty row, the heading, an instruction.
        let page = |rows| {
            let mut sheet = Sheet::new(40, rows);
            run.page(&mut Page::new(&mut sheet), FINISHED, AtEnd::PowerOff, false);
            assert!(sheet.text.lines().count() < rows, "{}", sheet.text);
            sheet.text
        };
        assert!(page(OTHER_ROWS + 7 + 3).contains("0x20"));
        assert!(!page(OTHER_ROWS + 7 + 2).contains("instructions"));
    }

    #[test]
    fn a_vm_that_is_started_again_has_another_row() {
        let mut run = run();
        run.add(row("split", SplitLocks::new(), "still running"));
        let latest = run.latest("split").unwrap();
        (latest.policy, latest.end) = (Some(Policy::Step), Short::of(format_args!("stopped")));
        let rows = |run: &Run, rows| {
            let mut sheet = Sheet::new(80, rows);
            run.table(&mut Page::new(&mut sheet), rows);
            sheet.text.lines().map(|line| line.trim().to_owned()).collect::<Vec<_>>()
        };
        let lines = rows(&run, 10);
        assert_eq!(lines[1], "split      warn    2      1            warn             exit 33");
        assert_eq!(lines[5], "split      step    2      0            -                stopped");
        // However often: nothing is lost of the sum, and no other VM's row.
        for _ in 0..3 * MAX_ROWS {
            run.add(row("split", locks(&[(Warn, 1)], false), "stopped"));
        }
        let lines = rows(&run, MAX_ROWS);
        assert_eq!(lines.len(), 1 + MAX_ROWS);
        for name in ["sld-aware", "legacy", "none"] {
            assert_eq!(lines.iter().filter(|line| line.starts_with(name)).count(), 1, "{name}");
        }
        let mut sheet = Sheet::new(80, 25);
        run.totals(&mut Page::new(&mut sheet), FINISHED);
        let seen = 6 + 3 * MAX_ROWS;
        assert_eq!(sheet.text, format!("  4 VMs, {seen} split locks seen, 77 VM exits\n"));
    }

    #[test]
    fn why_a_vm_cannot_start_is_shown_where_there_is_room() {
        let page = |rows| {
            let mut sheet = Sheet::new(40, rows);
            run().page(&mut Page::new(&mut sheet), FINISHED, AtEnd::PowerOff, false);
            sheet.text
        };
        // Four VMs, an empty row, and two for the reason.
        let why = "\n\n  none: the ramdisk has no file `a`:\n  add it, or correct `image`\n\n";
        assert!(page(OTHER_ROWS + 7).contains(why), "{}", page(OTHER_ROWS + 7));
        assert!(!page(OTHER_ROWS + 6).contains("ramdisk"));
    }

    #[test]
    fn what_to_do_is_said() {
        let text = |ending, at_end, is_kept| {
            let mut sheet = Sheet::new(66, 25);
            run().page(&mut Page::new(&mut sheet), ending, at_end, is_kept);
            assert!(sheet.text.lines().all(|line| line.len() <= 80), "{}", sheet.text);
            sheet.text
        };
        let stay = text(FINISHED, AtEnd::Stay, true);
        assert!(stay.contains("Press a key") && stay.contains("unsplit/log.txt"));
        assert!(!text(FINISHED, AtEnd::Stay, false).contains("log.txt"));
        assert!(!text(FINISHED, AtEnd::PowerOff, true).contains("Press a key"));
        assert!(text(FINISHED, AtEnd::Reboot, true).contains("starts again"));
        let why = "no VT-x: this CPU does not have VMX (CPUID.1:ECX[5] is 0). It takes another one";
        let refused = text(Ending::Refused(why), AtEnd::Stay, true);
        let lines: Vec<_> = refused.lines().filter(|line| line.contains("VMX")).collect();
        assert_eq!(lines, ["  no VT-x: this CPU does not have VMX (CPUID.1:ECX[5] is 0). It"]);
        assert!(!refused.contains("how it ended"));
        let broken = text(Ending::Finished { exits: 0, violations: 3 }, AtEnd::Stay, true);
        assert!(broken.contains("did not hold: 3"));
    }

    #[test]
    fn long_texts_are_cut() {
        let short: Short<4> = Short::of(format_args!("{}é", "abc"));
        assert_eq!(&*short.0, "abc");
        let all = AcOutcome::ALL.map(|outcome| (outcome, 100));
        assert_eq!(Verdicts(locks(&all, false)).text().0.len(), 64);
    }
}
