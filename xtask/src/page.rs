//! A run as one page of HTML: nothing else is loaded, no script is needed. What came from a guest, or
//! from anywhere else, is text: the templates escape it.

use std::collections::BTreeMap;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::events::{Body, Event, Offender};
use crate::report;
use crate::symbols::Symbols;
use crate::timeline::{Clock, Span, Timeline};

/// The time line's columns.
const COLUMNS: usize = 1000;
/// Its lanes: height, and distance from the top of one to that of the next.
const LANE: usize = 14;
const PITCH: usize = 20;
/// Where the columns begin: lanes' names stand before.
const LEFT: usize = 190;
/// Colours of vCPUs; more of them share these.
const COLOURS: usize = 8;

const STYLE: &str = "
:root { color-scheme: light dark; --text: #1b1b1f; --faint: #6a6a75; --line: #d8d8de; --ground: #fff;
  --on: #2d8a4e; --off: #c23b3b; --mixed: #c98a1b; --mark: #1b1b1f }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6ea; --faint: #9a9aa6; --line: #3a3a44; --ground: #16161a;
    --on: #58b97a; --off: #e06c6c; --mixed: #e0b050; --mark: #e6e6ea } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--ground);
  max-width: 78rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; font-size: 0.9rem }
.wide { overflow-x: auto }
th, td { text-align: left; padding: 0.15rem 0.9rem 0.15rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top }
th { color: var(--faint); font-weight: 600; white-space: nowrap }
td.number { text-align: right }
code { font: 0.9em ui-monospace, monospace; white-space: pre }
.note { color: var(--faint); max-width: 50rem }
svg { width: 100%; min-width: 60rem; height: auto }
svg text { font: 12px system-ui, sans-serif; fill: var(--text) }
.back { fill: var(--line); fill-opacity: 0.35 }
.on { fill: var(--on) } .off { fill: var(--off) } .mixed { fill: var(--mixed) }
.mark { fill: var(--mark) }
.c0 { fill: #4c78a8 } .c1 { fill: #f58518 } .c2 { fill: #72b7b2 } .c3 { fill: #b279a2 }
.c4 { fill: #54a24b } .c5 { fill: #eeca3b } .c6 { fill: #9d755d } .c7 { fill: #ff9da6 }
.key { display: inline-block; width: 0.8rem; height: 0.8rem; margin: 0 0.3rem 0 1rem }
.key svg { min-width: 0; width: 0.8rem; height: 0.8rem }
";

/// What a page is about.
pub struct Run<'a> {
    /// The machine, in words.
    pub machine: &'a [(&'static str, String)],
    /// Its events, in order.
    pub events: &'a [Event],
    /// The time of them.
    pub clock: Clock,
    /// The same by lanes.
    pub timeline: &'a Timeline,
    /// Who split locks, the most frequent ones first.
    pub offenders: &'a [Offender],
    /// The VMs' functions.
    pub symbols: &'a BTreeMap<String, Symbols>,
    /// Why the run is no good, if it is not.
    pub wrong: Option<&'a str>,
}

/// The text of the page.
pub fn text(run: &Run<'_>) -> String {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { "Unsplit: a run" }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { "Unsplit: a run" }
                @if let Some(wrong) = run.wrong {
                    p { strong { "This run was not in order: " (wrong) } }
                }
                (header(run))
                h2 { "VMs" }
                (vms(run.events))
                h2 { "What was seen" }
                (seen(run.events))
                h2 { "Which instructions split locks" }
                (offenders(run))
                h2 { "Time line" }
                (timeline(run))
            }
        }
    }
    .into_string()
}

fn header(run: &Run<'_>) -> Markup {
    let boot = run.events.iter().find_map(|event| match &event.body {
        Body::Boot { version, cpus, sld, sld_source, firmware, .. } => Some([
            version.clone(),
            cpus.to_string(),
            sld.clone(),
            sld_source.clone(),
            firmware.clone(),
        ]),
        _ => None,
    });
    let names = ["version", "CPUs used", "policy (sld)", "detection by", "booted by"];
    let boot = boot.map(|boot| names.into_iter().zip(boot));
    let Timeline { end, .. } = run.timeline;
    html! {
        table {
            @for (name, value) in run.machine { tr { th { (name) } td { (value) } } }
            @for (name, value) in boot.into_iter().flatten() { tr { th { (name) } td { (value) } } }
            tr { th { "lasted" } td { (run.clock.time(*end)) " " (run.clock.unit()) } }
            @if let Some(speed) = run.clock.ticks_per_second() {
                tr { th { "time from" } td { "the time-stamp counter, at " (speed) " ticks a second" } }
            }
        }
    }
}

fn vms(events: &[Event]) -> Markup {
    let rows = report::vms(events);
    html! {
        @if rows.is_empty() { p { "None." } } @else {
            div.wide { table {
                tr { @for heading in report::HEADING { th { (heading) } } }
                @for row in &rows { tr { @for cell in row { td { (cell) } } } }
            } }
        }
    }
}

/// How many events there were of each kind that matters, and those that should not be.
fn seen(events: &[Event]) -> Markup {
    let mut counts: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    let mut trouble: Vec<(&str, &str)> = Vec::new();
    for event in events {
        let key = match &event.body {
            Body::Ac(ac) if ac.legacy => {
                ("#AC that may be an ordinary alignment check", &*ac.verdict)
            }
            Body::Ac(ac) => ("#AC for a split lock", &*ac.verdict),
            Body::TestCtrlWrite { result, .. } => ("a guest's write to MSR 0x33", &**result),
            Body::RealBit { why, on: true, .. } => ("real bit switched on", &**why),
            Body::RealBit { why, on: false, .. } => ("real bit switched off", &**why),
            Body::TraceBit { why, on: true, .. } => ("tracing switched on", &**why),
            Body::TraceBit { why, on: false, .. } => ("tracing switched off", &**why),
            Body::MachineCheck { verdict, .. } => ("machine check", &**verdict),
            Body::Violation { what } => {
                trouble.push(("An invariant did not hold", what));
                continue;
            }
            Body::Panic { message } => {
                trouble.push(("The hypervisor panicked", message));
                continue;
            }
            Body::Refused { why } => {
                trouble.push(("The hypervisor cannot run here", why));
                continue;
            }
            Body::CpuRefused { why, .. } => {
                trouble.push(("A CPU is not used", why));
                continue;
            }
            _ => continue,
        };
        *counts.entry(key).or_default() += 1;
    }
    html! {
        @for (what, why) in trouble { p { strong { (what) ": " } (why) } }
        @if counts.is_empty() { p { "Nothing." } } @else {
            table {
                tr { th { "event" } th { "verdict or reason" } th { "times" } }
                @for ((event, reason), times) in counts {
                    tr { td { (event) } td { (reason) } td.number { (times) } }
                }
            }
        }
    }
}

fn offenders(run: &Run<'_>) -> Markup {
    let unit = run.clock.unit();
    let none = || "-".to_owned();
    html! {
        @if run.offenders.is_empty() { p { "None that was seen." } } @else {
            div.wide { table {
                tr {
                    th { "VM" } th { "vCPU" } th { "RIP" } th { "CR3" } th { "CPL" } th { "instruction" }
                    th { "function" } th { "split locks" } th { "verdict" }
                    th { "first, " (unit) } th { "last, " (unit) }
                }
                @for offender in run.offenders {
                    tr {
                        td { (offender.vm) } td { (offender.vcpu) }
                        td { code { (offender.rip) } } td { code { (offender.cr3) } }
                        td { (offender.cpl) } td { code { (offender.instruction()) } }
                        td { (offender.symbol(run.symbols).unwrap_or_else(none)) }
                        td.number { (offender.times()) } td { (offender.done()) }
                        td.number { (run.clock.time(offender.first)) }
                        td.number { (run.clock.time(offender.last)) }
                    }
                }
            } }
            p.note {
                "For each vCPU the hypervisor keeps the most frequent ones: a row with a range is one of "
                "too many, of which some may have been forgotten and counted again. Where detection was "
                "switched off for a vCPU, its later split locks are not seen."
            }
        }
    }
}

// ---- The time line -----------------------------------------------------------------------------

/// A stretch of columns that look the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stretch<T> {
    from: usize,
    to: usize,
    /// What it shows: of several things in one column, what lasted longest.
    shows: T,
    /// There is more than that in one of its columns.
    is_mixed: bool,
}

/// The columns of a time.
#[derive(Clone, Copy, Debug)]
struct Scale {
    start: u64,
    /// Ticks in all columns, at least one.
    length: u64,
}

impl Scale {
    fn of(timeline: &Timeline) -> Self {
        Self { start: timeline.start, length: (timeline.end - timeline.start).max(1) }
    }

    fn column(self, at: u64) -> usize {
        let ticks = u128::from(at.saturating_sub(self.start));
        let column = ticks * COLUMNS as u128 / u128::from(self.length);
        (column as usize).min(COLUMNS - 1)
    }

    /// When a column begins.
    fn begin(self, column: usize) -> u64 {
        let ticks = (u128::from(self.length) * column as u128).div_ceil(COLUMNS as u128);
        self.start.saturating_add(ticks as u64)
    }

    /// Thins intervals out: each column shows what lasted longest in it, and nothing only where there
    /// was nothing at all. As many stretches as there are columns at most.
    fn thin<T: Copy + Ord>(
        self,
        intervals: impl Iterator<Item = (u64, u64, T)>,
    ) -> Vec<Stretch<T>> {
        let mut columns: Vec<BTreeMap<T, u64>> = vec![BTreeMap::new(); COLUMNS];
        for (from, to, shows) in intervals {
            let (first, last) = (self.column(from), self.column(to.max(from + 1) - 1));
            for (column, times) in columns.iter_mut().enumerate().take(last + 1).skip(first) {
                let ticks =
                    to.min(self.begin(column + 1)).saturating_sub(from.max(self.begin(column)));
                // What is shorter than a tick was there all the same.
                *times.entry(shows).or_default() += ticks.max(1);
            }
        }
        let mut stretches: Vec<Stretch<T>> = Vec::new();
        for (column, times) in columns.iter().enumerate() {
            let longest = times.iter().max_by_key(|(_, ticks)| **ticks);
            let Some((shows, _)) = longest else { continue };
            let next =
                Stretch { from: column, to: column + 1, shows: *shows, is_mixed: times.len() > 1 };
            match stretches.last_mut() {
                Some(last)
                    if (last.to, last.shows, last.is_mixed) == (column, *shows, next.is_mixed) =>
                {
                    last.to = column + 1;
                }
                _ => stretches.push(next),
            }
        }
        stretches
    }
}

/// What is drawn, from top to bottom.
struct Drawing {
    scale: Scale,
    clock: Clock,
    lanes: Vec<Markup>,
}

impl Drawing {
    /// A lane of stretches, each with its class and what it is about, and marks above it.
    fn lane<T: Copy>(
        &mut self,
        name: &str,
        stretches: &[Stretch<T>],
        marks: &[(usize, String)],
        look: impl Fn(&Stretch<T>) -> (String, String),
    ) {
        let top = self.lanes.len() * PITCH;
        let when = |column| self.clock.time(self.scale.begin(column));
        self.lanes.push(html! {
            text x="0" y=(top + LANE - 3) { (name) }
            rect.back x=(LEFT) y=(top) width=(COLUMNS) height=(LANE) {}
            @for stretch in stretches {
                @let (class, about) = look(stretch);
                rect class=(class) x=(LEFT + stretch.from) y=(top + 2) height=(LANE - 2)
                    width=(stretch.to - stretch.from)
                {
                    title {
                        (about) ", " (when(stretch.from)) " to " (when(stretch.to)) " "
                        (self.clock.unit())
                    }
                }
            }
            @for (column, about) in marks {
                rect.mark x=(LEFT + column) y=(top) width="2" height="5" { title { (about) } }
            }
        });
    }
}

fn timeline(run: &Run<'_>) -> Markup {
    let Run { timeline, clock, .. } = *run;
    let scale = Scale::of(timeline);
    let mut drawing = Drawing { scale, clock, lanes: Vec::new() };
    let name = |vcpu: usize| timeline.vcpus[vcpu].name();
    if timeline.is_scheduled() {
        for cpu in &timeline.cpus {
            let turns = timeline.turns(*cpu);
            let turns = turns.iter().map(|turn| (turn.from, turn.to, turn.vcpu));
            drawing.lane(&format!("CPU {cpu} runs"), &scale.thin(turns), &[], |stretch| {
                let others = if stretch.is_mixed { " longest, and others" } else { "" };
                (
                    format!("c{}", stretch.shows % COLOURS),
                    format!("{}{others}", name(stretch.shows)),
                )
            });
        }
    }
    let flag =
        |stretch: &Stretch<bool>, on: &str, off: &str| match (stretch.is_mixed, stretch.shows) {
            (true, _) => ("mixed".to_owned(), format!("{on} and {off}")),
            (false, true) => ("on".to_owned(), on.to_owned()),
            (false, false) => ("off".to_owned(), off.to_owned()),
        };
    for (number, core) in &timeline.cores {
        let ends = core.bit.iter().skip(1).map(|written| written.at).chain([timeline.end]);
        let intervals =
            core.bit.iter().zip(ends).map(|(written, end)| (written.at, end, written.on));
        let cpus: Vec<String> = core.cpus.iter().map(u32::to_string).collect();
        let title = match cpus.as_slice() {
            [one] => format!("real bit, CPU {one}"),
            _ => format!("real bit, core {number} (CPUs {})", cpus.join(", ")),
        };
        drawing.lane(&title, &scale.thin(intervals), &[], |stretch| flag(stretch, "on", "off"));
    }
    for (index, vcpu) in timeline.vcpus.iter().enumerate() {
        let spans = timeline.spans.iter().filter(|span| span.vcpu == index);
        let intervals = spans.map(|Span { from, to, disabled, .. }| (*from, *to, !disabled));
        let mut columns: BTreeMap<usize, BTreeMap<&str, u64>> = BTreeMap::new();
        for mark in &vcpu.marks {
            *columns.entry(scale.column(mark.at)).or_default().entry(&mark.name).or_default() += 1;
        }
        let about = |(column, names): (usize, BTreeMap<&str, u64>)| {
            let names = names.iter().map(|(name, times)| match times {
                1 => (*name).to_owned(),
                _ => format!("{name} x{times}"),
            });
            let when = clock.time(scale.begin(column));
            (column, format!("{when} {}: {}", clock.unit(), names.collect::<Vec<_>>().join(", ")))
        };
        let marks: Vec<(usize, String)> = columns.into_iter().map(about).collect();
        drawing.lane(&name(index), &scale.thin(intervals), &marks, |stretch| {
            flag(stretch, "runs, SLD not disabled", "runs, SLD disabled")
        });
    }
    let height = drawing.lanes.len() * PITCH;
    let column = clock.nanoseconds(timeline.end) / COLUMNS as u64;
    let column = match clock.ticks_per_second() {
        Some(_) if column < 1_000_000 => format!("{}.{:03} µs", column / 1000, column % 1000),
        Some(_) => format!("{}.{:03} ms", column / 1_000_000, column / 1000 % 1000),
        None => format!("{column} ticks"),
    };
    html! {
        @if !timeline.is_scheduled() {
            p {
                "Which vCPU ran where is not known: hv.toml lacks " code { "schedule_events = true" }
                ", or no vCPU ran."
            }
        }
        p {
            @for (class, what) in
                [("on", "on, not disabled"), ("off", "off, disabled"), ("mixed", "both in one column")]
            {
                span.key { svg viewBox="0 0 10 10" { rect class=(class) width="10" height="10" {} } }
                (what)
            }
            @if timeline.is_scheduled() {
                @for (index, vcpu) in timeline.vcpus.iter().enumerate() {
                    span.key {
                        svg viewBox="0 0 10 10" {
                            rect class={ "c" (index % COLOURS) } width="10" height="10" {}
                        }
                    }
                    (vcpu.name())
                }
            }
        }
        div.wide {
            svg viewBox={ "0 0 " (LEFT + COLUMNS + 2) " " (height + PITCH) } role="img" {
                title { "Time line" }
                @for lane in &drawing.lanes { (lane) }
                text x=(LEFT) y=(height + LANE) { "0" }
                text x=(LEFT + COLUMNS) y=(height + LANE) text-anchor="end" {
                    (clock.time(timeline.end)) " " (clock.unit())
                }
            }
        }
        p.note {
            "The picture is thinned out: one of its " (COLUMNS) " columns is " (column) ". Where more than "
            "one vCPU ran on a CPU within a column, it has the colour of the one that ran longest. A "
            "vCPU's lane is filled while it ran; the small marks at its upper edge are its #ACs and its "
            "writes to MSR 0x33, all of those in a column together. Point at something to see what it is. "
            "The trace (" code { "--trace FILE" } ") has everything."
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::parse_lines;
    use crate::offenders;
    use crate::timeline::tests::{RUN, run};

    fn page(events: &[Event]) -> String {
        let timeline = Timeline::of(events);
        text(&Run {
            machine: &[("machine", "a <toy>".to_owned())],
            events,
            clock: Clock::of_run(events, None),
            timeline: &timeline,
            offenders: &offenders::all(events),
            symbols: &BTreeMap::from([("b<i>".to_owned(), Symbols::from([(0, 0x40, "f<T>")]))]),
            wrong: Some("it is <only> a test"),
        })
    }

    #[test]
    fn a_page_has_all_that_there_was() {
        let page = page(&run());
        for part in [
            "the time-stamp counter, at 1000000 ticks a second",
            "it is &lt;only&gt; a test",
            "<td>#AC for a split lock</td><td>step</td><td class=\"number\">1</td>",
            "<td>real bit switched off</td><td>warn</td>",
            "<code>lock add dword ptr [rax], 1</code>",
            "f&lt;T&gt;+0x20",
            "<title>a/0, 0.000100 to 0.000200 s</title>",
            ">real bit, CPU 1</text>",
            "<title>0.000233 s: #AC: step</title>",
            "exit 33",
            "one of its 1000 columns is 0.400 µs",
        ] {
            assert!(page.contains(part), "{part} is not in\n{page}");
        }
        assert!(!page.contains("hv.toml lacks"));
    }

    #[test]
    fn what_comes_from_elsewhere_is_text_and_nothing_else_is_loaded() {
        let page = page(&run());
        for part in ["<i>", "<toy>", "<only>", "<T>", "<script", "http", "url(", "src="] {
            assert!(!page.contains(part), "{part} is in\n{page}");
        }
    }

    #[test]
    fn without_turns_the_page_says_so() {
        let lines = RUN.lines().filter(|line| !line.contains("load") && !line.contains("put\""));
        let events: Vec<Event> =
            parse_lines(&lines.flat_map(|line| [line, "\n"]).collect::<String>()).unwrap();
        let without = page(&events);
        assert!(without.contains("hv.toml lacks"));
        assert!(!without.contains("CPU 0 runs"));
        // Nothing at all happened.
        assert!(page(&[]).contains("None that was seen."));
    }

    #[test]
    fn a_column_shows_what_lasted_longest_and_that_there_was_more() {
        let scale = Scale { start: 1000, length: 100 * COLUMNS as u64 };
        let show = |intervals: &[(u64, u64, u8)]| {
            let thinned = scale.thin(intervals.iter().copied());
            let stretches = thinned.into_iter();
            stretches.map(|s| (s.from, s.to, s.shows, s.is_mixed)).collect::<Vec<_>>()
        };
        assert_eq!(show(&[(1000, 1300, 1)]), [(0, 3, 1, false)]);
        // A switch within column 2.
        assert_eq!(
            show(&[(1000, 1240, 1), (1240, 1400, 2)]),
            [(0, 2, 1, false), (2, 3, 2, true), (3, 4, 2, false)]
        );
        // One tick of it is enough to be seen.
        assert_eq!(show(&[(1450, 1451, 7)]), [(4, 5, 7, false)]);
        assert_eq!(show(&[(1450, 1450, 7)]), [(4, 5, 7, false)]);
        // The end of all.
        let end = scale.start + scale.length;
        assert_eq!(show(&[(end - 1, end, 3)]), [(COLUMNS - 1, COLUMNS, 3, false)]);
        assert_eq!(show(&[(end, end, 3)]), [(COLUMNS - 1, COLUMNS, 3, false)]);
        // However much there is, it is drawn with a rectangle a column.
        let many = |n: u64| (1000 + n * 3, 1002 + n * 3, (n % 5) as u8);
        assert!(scale.thin((0..30_000).map(many)).len() <= COLUMNS);
    }

    #[test]
    fn columns_are_as_long_as_they_are_said_to_be() {
        for (start, length) in
            [(0, 1), (5, 7), (100, 999), (1, 1001), (3, 123_456_789), (0, u64::MAX)]
        {
            let scale = Scale { start, length };
            for column in [0, 1, 2, 499, 500, 998, 999] {
                let begin = scale.begin(column);
                if begin < start + length {
                    assert!(scale.column(begin) >= column, "{start} {length} {column}");
                }
                if begin > start {
                    assert!(scale.column(begin - 1) < column, "{start} {length} {column}");
                }
            }
        }
    }
}
