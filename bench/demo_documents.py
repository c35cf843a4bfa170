"""The demo's library: eight chapters of a handbook, written for this purpose.

The company, its ships and its islands do not exist. Every chapter has about 400 tokens, and none
repeats what another says, so that an answer can come from one chapter only.
"""

from __future__ import annotations

from typing import Final

SYSTEM_PROMPT: Final = (
    "You are the information desk of the Northmoor Ferry Company. You answer questions of "
    "passengers and of new colleagues. You are given chapters of the company's handbook. Read "
    "them, then answer the question that follows in one or two short sentences. Use only what the "
    "chapters say. If they do not say it, answer that the handbook does not cover it. Be friendly, "
    "be precise, and give numbers and names as they are written in the handbook."
)

FLEET: Final = """\
Chapter: The fleet
The Northmoor Ferry Company owns four ships. The oldest is the Grey Heron, built in 1987 and \
rebuilt twice since. She carries 220 passengers and 30 cars, and she is the only ship of the \
company that still has a wooden wheelhouse. Crews like her because she is quiet in a swell. The \
Petrel, built in 1999, was made for the short crossing to Callow Island. She carries 180 \
passengers and no cars, turns around in twelve minutes, and makes nine crossings on a summer \
day. The largest ship is the Lady Annis, which carries 640 passengers and 145 cars. She was \
delivered in 2014 and sails the long route to Sundry every morning and every evening. Her two \
engines burn gas, and a bank of batteries lets her enter the harbour without smoke and almost \
without noise. The youngest ship is the Kestrel, a catamaran of 2021. She carries 300 passengers \
and 12 bicycles, reaches 32 knots, and crosses to Merrow in forty minutes, which takes the Grey \
Heron almost two hours. Every ship is taken out of service for three weeks between January and \
March. In that time the hull is cleaned and painted, the engines are opened, and the safety \
equipment is replaced where its date has passed. While one ship is in the dock, the Grey Heron \
takes over her route, which is why the timetable in winter shows longer crossings. The names of \
the ships follow an old rule of the founders: working ships are named after birds, and only the \
flagship may carry the name of a person. Lady Annis was the founder's grandmother, who sold her \
house so that he could buy his first boat."""

FARES: Final = """\
Chapter: Tickets and fares
Tickets are sold at the counters in all five harbours, at the machines on the quays and on the \
company's web page. The price depends on the route and on the season, never on how full a ship \
is. On the short crossing to Callow Island an adult pays 6 pounds one way and 10 pounds return. \
On the long crossing to Sundry an adult pays 24 pounds one way and 40 pounds return. The fast \
crossing to Merrow costs 18 pounds one way and 32 pounds return. Children under five travel free \
of charge, and children from five to fifteen pay half. People who live on the islands hold a \
blue card, which gives them a third off every fare and lets them book a car place until one hour \
before the departure. A family ticket covers two adults and up to three children and costs as \
much as two and a half adults. Groups of ten or more book by telephone and get one free place \
for every ten that they pay. A ticket is valid on the day that is printed on it and on the day \
after. It can be moved to another day once, free of charge, until two hours before the \
departure. After that a change costs 5 pounds. If the company cancels a crossing, the whole fare \
is paid back within seven days, and the passenger need not ask for it. A lost ticket is replaced \
at any counter if the passenger can name the booking number or show the card it was paid with. \
Tickets bought on board cost two pounds more than on land, because the purser has to issue them \
by hand. Students show their card at the counter and save a quarter from Monday to Thursday."""

LUGGAGE: Final = """\
Chapter: Luggage and bicycles
Every passenger may bring two pieces of luggage that one person can carry. There is no scale at \
the gate, but the crew may refuse a piece that takes two people to lift. Large luggage goes into \
the racks beside the stairs on the car deck and cannot be reached during the crossing, so \
medicine, papers and warm clothes should stay with the passenger. The company is not liable for \
money and jewellery left in the racks. Bicycles travel for 3 pounds on every route. On the Lady \
Annis and the Grey Heron there is always room for them, on the Kestrel there are twelve places \
which have to be booked, and on the Petrel they stand on the open deck at the stern and get wet \
when it blows. Electric bicycles are welcome, but their batteries must not be charged on board. \
Kayaks and surfboards count as bicycles if they are shorter than three metres, and longer ones \
need a place on the car deck. Musical instruments travel free of charge, and a cello may have \
the seat beside its owner if the ship is not full. Lost property is kept in the harbour office \
at Northmoor for ninety days. Each item gets a yellow label with the date and the crossing on \
which it was found. After ninety days it is given to the sailors' charity, except for keys, \
which are destroyed, and documents, which are handed to the police. Anyone who misses something \
should write down the ship, the date and the seat as soon as possible, since most things are \
found on the same day, when the cleaners go through the lounges between the last crossing and \
midnight."""

ANIMALS: Final = """\
Chapter: Animals on board
Animals are welcome on all ships, with a few rules that make the crossing pleasant for \
everybody. Dogs travel free of charge and must be kept on a short lead all the time. They may be \
on the open decks and in the lounge with the green carpet, but not in the restaurant and not in \
the cabins. On the Lady Annis there are eight kennels on deck four. They are dry and heated and \
can be booked for 5 pounds a crossing, and the owner keeps the key. Cats and small animals stay \
in their box or cage, which may stand on the floor beside the seat but not on the seat. Horses \
travel in a trailer or in a lorry only, and somebody who knows the animal must be on board, with \
a telephone number at the purser's desk. On days with waves of more than three metres the \
company takes no horses, because they cannot hold themselves on a wet deck. Sheep and cattle go \
with the freight sailing on Tuesday and Friday at six in the morning, when the car deck is \
washed down afterwards. Guide dogs and other assistance dogs may go everywhere that their owner \
goes, the restaurant included, and need no lead if their harness is on. Water bowls stand at the \
door of the green lounge and at the stern. Birds of prey have to wear a hood. Bees are carried \
twice a year, in April and in September, at night and in closed hives, when the beekeepers of \
Merrow move them to the heather. A passenger who is allergic to animals should tell the purser, \
who will find a seat in the forward lounge, where no animal is ever allowed."""

SAFETY: Final = """\
Chapter: Safety on board
Before every departure the crew counts the passengers and compares the number with the tickets. \
The ship does not sail before the two numbers agree. During the first ten minutes a short film \
in the lounges shows where the life jackets are and how they are worn. Life jackets for adults \
lie under the seats, and those for children hang in the red lockers beside the doors. There are \
always a fifth more of them than there are passengers. The alarm for leaving the ship is seven \
short blasts and one long one. When it sounds, passengers go to the assembly station whose \
letter is printed on their ticket, and they take nothing with them. Nobody uses the lifts. The \
crew practises this every week, on Wednesday after the midday crossing, and twice a year \
together with the coast guard. Each ship carries two doctors' bags, a machine for starting a \
heart again in the purser's office, and at least three people who have learned to use it. \
Smoking is allowed at the stern of the open deck and nowhere else. The car deck is locked as \
soon as the ship has left the quay and is opened again when she is made fast, and no one may \
stay in a car in between, because a lorry that moves in a sea can crush a door shut. Children \
must be held by the hand on the stairs. In fog the ship's whistle sounds every two minutes, \
which frightens some passengers and means nothing worse than that the captain is careful. \
Whoever sees a person fall into the water shouts, throws one of the orange rings, points at the \
person and keeps pointing until somebody of the crew has taken over."""

WEATHER: Final = """\
Chapter: Weather and cancelled crossings
The captain decides alone whether a ship sails, and nobody in the office may ask him to change \
his mind. As a rule the Petrel stays in the harbour when the wind reaches force seven, the \
Kestrel when the waves are higher than two and a half metres, and the two large ships when the \
wind reaches force ten. The duty officer looks at the forecast at five in the morning, at noon \
and at six in the evening, and writes the result on the company's web page within a quarter of \
an hour. Passengers who left a telephone number get a message. A crossing that is cancelled is \
not made up for later on the same day, but the next sailing takes as many passengers as it \
safely can, first those with a medical appointment, then people who live on the island, then \
everybody else in the order of their bookings. Those who have to wait over night get a bed in \
the company's hostel at Northmoor, which has forty beds, or in the parish hall at Sundry. \
Breakfast is free for them. If the harbour of Merrow cannot be entered because of the swell, the \
Kestrel goes on to Sundry, and a bus takes the passengers across the bridge, which takes fifty \
minutes. Ice is rare, but in the winter of 2010 the inner harbour was frozen for nine days, and \
food was carried to Callow Island over the ice on sledges. Since then each island keeps a store \
of flour, milk powder, candles and fuel for two weeks. Fog delays a crossing more often than \
wind does, by half an hour on average, and it is most common in May, when the air is warm and \
the sea is still cold."""

CREW: Final = """\
Chapter: Crews, shifts and training
A new colleague begins with two weeks on land. In the first week he or she learns to sell \
tickets, to guide cars onto the deck and to tie the ship to the quay. The second week is spent \
at the training pool in Hallam, with life rafts, fire hoses and first aid. After that every new \
deckhand sails for three months with a mentor, who signs a green book for each task that has \
been learned. Work is done in shifts of seven days, followed by seven days at home. During the \
seven days on duty nobody works for more than eleven hours in one day, and there are always ten \
hours of rest between two turns. Crews of the Lady Annis sleep on board, in single cabins on \
deck six. All others go home or stay in the crew house behind the harbour office. The uniform is \
dark blue, and the company pays for it and for its cleaning. Safety shoes have to be worn on the \
car deck by everybody, officers included. Wages are paid on the twentieth of the month. Whoever \
works on Christmas Day or on New Year's Day gets two days off in return, to be taken before \
Easter. The company pays for the mate's certificate of any deckhand who has been on board for \
three years, under the condition that he or she stays for another two. There is a choir of the \
crews, which sings at the launch of the summer timetable and at funerals, and a rowing team that \
has beaten the fire brigade in six of the last nine years. Complaints about a superior are made \
to Mrs Okafor in the harbour office, who is bound to keep the name to herself and to answer \
within a week."""

GALLEY: Final = """\
Chapter: The restaurant and the galley
There is a restaurant on the Lady Annis, a bar with hot food on the Grey Heron and the Kestrel, \
and a machine for tea and soup on the Petrel. The restaurant opens twenty minutes after the \
departure and closes twenty minutes before the arrival. Its best known dish is the fish pie of \
the house, made of haddock, leeks and potatoes with a crust of oats, at 11 pounds. The recipe is \
from the wife of the first captain and may not be changed. Every day there are a dish without \
meat and a dish without gluten, and the cook can name the contents of each of them. Fish is \
bought from the boats at Northmoor between four and five in the morning, bread comes from the \
bakery on Callow Island, and milk and cheese come from three farms on Merrow. What is left in \
the evening is offered for half the price on the last crossing, and what is then still left goes \
to the pigs of the harbour farm. Children get a small portion of every dish for half the price \
and an apple for nothing. Passengers may eat their own food in all lounges, but not in the \
restaurant. Alcohol is sold from eleven in the morning, to people of eighteen and older, and \
never to drivers who have not yet left the ship. In heavy weather the galley serves cold dishes \
only, because the stoves are switched off when the ship rolls by more than fifteen degrees. \
Crews eat before the passengers do, at the long table beside the galley, and the captain eats \
with them. On the first Sunday of the month there is a breakfast with music, for which tables \
have to be booked a week before."""
