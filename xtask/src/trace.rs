//! A run as a trace for [Perfetto](https://ui.perfetto.dev), which also reads the JSON of Chrome's
//! "Trace Event Format": an object `traceEvents` of events, times in microseconds.

use anyhow::Result;
use serde_json::{Value, json};

use crate::timeline::{Clock, Timeline};

/// The track group of the CPUs; those of VMs come behind it.
const CPUS: u64 = 1;

/// The text of the file.
///
/// # Errors
/// If it cannot be written as JSON.
pub fn text(timeline: &Timeline, clock: &Clock) -> Result<String> {
    let trace = json!({
        "traceEvents": events(timeline, clock),
        "displayTimeUnit": "ns",
        "otherData": {
            "ticks_per_second": clock.ticks_per_second(),
            "time": match clock.ticks_per_second() {
                Some(_) => "from the first event on",
                None => "from the first event on; one tick is shown as one nanosecond",
            },
        },
    });
    Ok(serde_json::to_string(&trace)?)
}

/// Numbers of tracks and groups, each once.
struct Tracks {
    /// What names them.
    names: Vec<Value>,
    last: u64,
}

impl Tracks {
    fn group(&mut self, group: u64, name: &str) {
        self.names.push(json!({
            "ph": "M", "pid": group, "name": "process_name", "args": { "name": name },
        }));
        self.names.push(json!({
            "ph": "M", "pid": group, "name": "process_sort_index", "args": { "sort_index": group },
        }));
    }

    fn track(&mut self, group: u64, name: &str) -> u64 {
        self.last += 1;
        let track = self.last;
        self.names.push(json!({
            "ph": "M", "pid": group, "tid": track, "name": "thread_name", "args": { "name": name },
        }));
        self.names.push(json!({
            "ph": "M", "pid": group, "tid": track, "name": "thread_sort_index",
            "args": { "sort_index": track },
        }));
        track
    }
}

/// Names first, then everything in order of time.
fn events(timeline: &Timeline, clock: &Clock) -> Vec<Value> {
    let time = |tsc| clock.nanoseconds(tsc);
    let microseconds = |nanoseconds: u64| nanoseconds as f64 / 1000.0;
    let mut tracks = Tracks { names: Vec::new(), last: 0 };
    let mut events: Vec<(u64, Value)> = Vec::new();
    let mut slice = |group: u64, track: u64, (from, to): (u64, u64), name: &str, args: Value| {
        let (from, to) = (time(from), time(to));
        events.push((
            from,
            json!({
                "ph": "X", "pid": group, "tid": track, "name": name, "args": args,
                "ts": microseconds(from), "dur": microseconds(to - from),
            }),
        ));
    };

    tracks.group(CPUS, "CPUs");
    for cpu in &timeline.cpus {
        let track = tracks.track(CPUS, &format!("CPU {cpu}"));
        for turn in timeline.turns(*cpu) {
            slice(CPUS, track, (turn.from, turn.to), &timeline.vcpus[turn.vcpu].name(), json!({}));
        }
    }
    // The vCPUs of a VM stand together.
    let mut groups: Vec<&str> = Vec::new();
    let mut instants = Vec::new();
    for (index, vcpu) in timeline.vcpus.iter().enumerate() {
        let known = groups.iter().position(|vm| *vm == vcpu.vm);
        let group = known.unwrap_or_else(|| {
            groups.push(&vcpu.vm);
            groups.len() - 1
        });
        let group_number = CPUS + 1 + group as u64;
        if known.is_none() {
            tracks.group(group_number, &format!("VM {}", vcpu.vm));
        }
        let track = tracks.track(group_number, &format!("vCPU {}", vcpu.index));
        for span in timeline.spans.iter().filter(|span| span.vcpu == index) {
            let name = if span.disabled { "SLD disabled" } else { "SLD not disabled" };
            slice(group_number, track, (span.from, span.to), name, json!({ "cpu": span.cpu }));
        }
        for mark in &vcpu.marks {
            let mut args = serde_json::Map::from_iter([("cpu".to_owned(), json!(mark.cpu))]);
            args.extend(mark.details.iter().map(|(key, value)| ((*key).to_owned(), json!(value))));
            let at = time(mark.at);
            instants.push((
                at,
                json!({
                    "ph": "i", "s": "t", "pid": group_number, "tid": track, "name": mark.name,
                    "args": args, "ts": microseconds(at),
                }),
            ));
        }
    }
    for (number, core) in &timeline.cores {
        for written in &core.bit {
            let at = time(written.at);
            instants.push((
                at,
                json!({
                    "ph": "C", "pid": CPUS, "name": format!("real bit, core {number}"),
                    "args": { "on": u8::from(written.on) }, "ts": microseconds(at),
                }),
            ));
        }
    }
    events.append(&mut instants);
    events.sort_by_key(|(at, _)| *at);
    tracks.names.into_iter().chain(events.into_iter().map(|(_, event)| event)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timeline::tests::run;
    use std::collections::BTreeMap;

    fn parsed(clock: &Clock) -> (Vec<Value>, Value) {
        let text = text(&Timeline::of(&run()), clock).unwrap();
        let mut trace: Value = serde_json::from_str(&text).unwrap();
        let events = trace["traceEvents"].take();
        (events.as_array().unwrap().clone(), trace)
    }

    /// A tick a microsecond.
    fn clock() -> Clock {
        Clock::of(100, Some(1_000_000))
    }

    #[test]
    fn every_event_has_what_the_format_wants() {
        let (events, trace) = parsed(&clock());
        assert_eq!(trace["otherData"]["ticks_per_second"], 1_000_000);
        let mut named = BTreeMap::new();
        let (mut last, mut free) = (0.0, BTreeMap::new());
        for event in &events {
            let is = |phase: &str| event["ph"] == phase;
            assert!(event["name"].is_string() && event["pid"].is_u64(), "{event}");
            let place = (event["pid"].as_u64(), event["tid"].as_u64());
            if is("M") {
                named.insert(place, event["args"].clone());
                continue;
            }
            let at = event["ts"].as_f64().unwrap();
            assert!(at >= last, "not in order: {event}");
            last = at;
            // Whatever has a track has a name for it.
            assert!(is("C") || named.contains_key(&place), "{event}");
            assert!(named.contains_key(&(place.0, None)), "{event}");
            match event["ph"].as_str().unwrap() {
                // Slices of one track are one after the other.
                "X" => {
                    let end = at + event["dur"].as_f64().unwrap();
                    let before = free.insert(place, end).unwrap_or(0.0);
                    assert!(before <= at && at <= end, "{event}");
                }
                "i" => assert_eq!(event["s"], "t", "{event}"),
                "C" => assert!(event["args"]["on"].is_u64(), "{event}"),
                other => panic!("phase {other}"),
            }
        }
    }

    #[test]
    fn tracks_say_what_the_events_say() {
        let (events, _) = parsed(&clock());
        let track = |group: &str, name: &str| {
            let find = |what: &str, name: &str| {
                let found = |event: &&Value| event["name"] == what && event["args"]["name"] == name;
                events.iter().find(found).unwrap_or_else(|| panic!("no {what} {name}"))
            };
            let group = find("process_name", group)["pid"].clone();
            let found = events.iter().find(|event| {
                event["name"] == "thread_name"
                    && event["pid"] == group
                    && event["args"]["name"] == name
            });
            let track = found.unwrap_or_else(|| panic!("no track {name}"))["tid"].clone();
            let on_it = events.iter().filter(|event| {
                event["ph"] != "M" && event["pid"] == group && event["tid"] == track
            });
            let shown = on_it.map(|event| {
                let at = |key: &str| event[key].as_f64().map(|time| time as u64);
                (event["name"].as_str().unwrap().to_owned(), at("ts").unwrap(), at("dur"))
            });
            shown.collect::<Vec<_>>()
        };
        let slice = |name: &str, at, length| (name.to_owned(), at, Some(length));
        let instant = |name: &str, at| (name.to_owned(), at, None);
        assert_eq!(track("CPUs", "CPU 0"), [slice("a/0", 100, 100), slice("b<i>/0", 220, 80)]);
        assert_eq!(track("CPUs", "CPU 1"), [slice("a/0", 250, 150)]);
        assert_eq!(
            track("VM a", "vCPU 0"),
            [
                slice("SLD not disabled", 100, 50),
                slice("SLD disabled", 150, 50),
                instant("#AC: warn", 150),
                slice("SLD disabled", 250, 150),
            ]
        );
        assert_eq!(
            track("VM b<i>", "vCPU 0"),
            [
                slice("SLD not disabled", 220, 80),
                instant("#AC: step", 233),
                instant("0x33: gp", 240),
            ]
        );
        let bits = events.iter().filter(|event| event["name"] == "real bit, core 0");
        let bits: Vec<_> = bits.map(|event| event["args"]["on"].as_u64().unwrap()).collect();
        assert_eq!(bits, [1, 0, 1, 0, 1]);
        let warned = events.iter().find(|event| event["name"] == "#AC: warn").unwrap();
        assert_eq!((&warned["args"]["rip"], &warned["args"]["cpu"]), (&json!("0x10"), &json!(0)));
    }

    #[test]
    fn without_a_known_speed_a_tick_is_a_nanosecond() {
        let (events, trace) = parsed(&Clock::of(100, None));
        let slice = events.iter().find(|event| event["ph"] == "X").unwrap();
        assert_eq!((slice["ts"].as_f64(), slice["dur"].as_f64()), (Some(0.1), Some(0.1)));
        assert!(trace["otherData"]["time"].as_str().unwrap().contains("one nanosecond"));
    }
}
