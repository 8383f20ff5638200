// Command watermill measures Watermill on a running broker, and prints the seconds that the measured part took.
//   - default: the library as it comes, but for what makes it safe: confirms and quorum queues, or acks of all replicas.
//   - tuned: the fastest found that is as safe. What was tried stands beside the settings, as messages a second of 256
//     bytes, client and broker on two cores that others used too: differences below a third are noise.
//   - transactional: publishing to RabbitMQ in batches.
//
// In its favour: messages are made before the clock starts, nothing is logged, and handlers do nothing but ack.
package main

import (
	"bytes"
	"fmt"
	"log"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
)

// broker is how Watermill is set up for one. The name is that of the queue, or of the topic and the group.
type broker interface {
	declare(name string)
	publishing(mode string) (publishers []message.Publisher, goroutines, batch int)
	subscribe(mode, name string) (message.Subscriber, []<-chan *message.Message)
	unacked(name string, count int) int // By the broker: what is back in the queue, or not committed.
	remove(name string)
}

// publish takes the time from the first call of Publish to the last return, each being when the broker has confirmed.
func publish(b broker, mode, name string, messages, warmUp []*message.Message) time.Duration {
	publishers, goroutines, batch := b.publishing(mode)
	for _, publisher := range publishers {
		defer publisher.Close()
		check(publisher.Publish(name, warmUp...))
	}
	var group sync.WaitGroup
	began := time.Now()
	for i := range goroutines {
		group.Go(func() {
			for n := i * batch; n < len(messages); n += goroutines * batch {
				check(publishers[i%len(publishers)].Publish(name, messages[n:min(n+batch, len(messages))]...))
			}
		})
	}
	group.Wait()
	return time.Since(began)
}

// consume takes the time from the first message that a handler gets to the ack of the last.
func consume(b broker, mode, name string, count int) time.Duration {
	var first sync.Once
	var began time.Time
	var received atomic.Int64
	done := make(chan time.Duration, 1)
	defer time.AfterFunc(120*time.Second, func() { log.Fatalln("only", received.Load(), "messages arrived") }).Stop()
	subscriber, subscriptions := b.subscribe(mode, name)
	for _, messages := range subscriptions {
		go func() {
			for m := range messages {
				first.Do(func() { began = time.Now() })
				m.Ack()
				if received.Add(1) == int64(count) {
					done <- time.Since(began)
				}
			}
		}()
	}
	took := <-done
	time.Sleep(500 * time.Millisecond) // Ack tells the subscriber only, which then tells the broker, unless it is closed.
	check(subscriber.Close())
	time.Sleep(500 * time.Millisecond)
	if n, unacked := received.Load(), b.unacked(name, count); n != int64(count) || unacked != 0 {
		log.Fatalln(n, "messages arrived, and the broker has no ack of", unacked)
	}
	return took
}

func main() {
	log.SetFlags(0)
	if len(os.Args) != 7 {
		log.Fatalln("watermill <rabbitmq|kafka> <address> <publish|consume> <default|tuned|transactional> <count> <bytes>")
	}
	kind, address, action, mode := os.Args[1], os.Args[2], os.Args[3], os.Args[4]
	messages := make([]*message.Message, must(strconv.ParseUint(os.Args[5], 10, 31)))
	payload := bytes.Repeat([]byte("x"), int(must(strconv.ParseUint(os.Args[6], 10, 31))))
	b := map[string]broker{"rabbitmq": rabbitMQ{address}, "kafka": kafkaBroker{address}}[kind]
	known := slices.Contains([]string{"publish", "consume"}, action) && slices.Contains([]string{"default", "tuned"}, mode)
	if b == nil || len(messages) == 0 || !known && kind+action+mode != "rabbitmqpublishtransactional" {
		log.Fatalln("unknown:", kind, action, mode, len(messages))
	}
	for n := range messages {
		messages[n] = message.NewMessage(watermill.NewUUID(), bytes.Clone(payload))
		messages[n].Metadata = message.Metadata{"type": "bench.v1", "source": "bench", "key": fmt.Sprint("key-", n%1000)}
	}
	name := fmt.Sprintf("watermill-%d-%d", os.Getpid(), time.Now().UnixNano())
	b.declare(name)
	var took time.Duration
	if action == "publish" {
		took = publish(b, mode, name, messages, messages[:1])
	} else {
		publish(b, "tuned", name, messages, nil)
		took = consume(b, mode, name, len(messages))
	}
	b.remove(name) // What lies there shall not slow down the next run.
	fmt.Println(took.Seconds())
}

func check(err error) {
	if err != nil {
		log.Fatalln(err)
	}
}

func must[T any](value T, err error) T {
	check(err)
	return value
}
